"""Every public name of the package and the room it lives in: the one list that code and type checkers read."""

from . import (
    accounting as accounting,
    cli as cli,
    data as data,
    early_exit as early_exit,
    glimpse as glimpse,
    lidar as lidar,
    models as models,
    moe as moe,
    privacy as privacy,
    pruning as pruning,
    reporting as reporting,
    shapley as shapley,
    surgery as surgery,
    synthesis as synthesis,
)
from .accounting import (
    PrivacyLedger as PrivacyLedger,
)
from .batch import (
    BatchKeys as BatchKeys,
    split_batch as split_batch,
)
from .data import (
    ByteTextDataModule as ByteTextDataModule,
    CanvasDataModule as CanvasDataModule,
    DigitsDataModule as DigitsDataModule,
    FashionMNISTDataModule as FashionMNISTDataModule,
)
from .early_exit import (
    EarlyExitModule as EarlyExitModule,
    ExitLosses as ExitLosses,
    ExitReport as ExitReport,
    GradientDominance as GradientDominance,
    Head as Head,
    MultiExitNetwork as MultiExitNetwork,
    Phase as Phase,
    PhaseEarlyStopping as PhaseEarlyStopping,
    ThresholdCalibration as ThresholdCalibration,
    export_early_exit as export_early_exit,
    load_early_exit as load_early_exit,
)
from .glimpse import (
    AdaGlimpseModule as AdaGlimpseModule,
    AgentConfig as AgentConfig,
    CanvasBackbone as CanvasBackbone,
    ClassificationTask as ClassificationTask,
    ElasticViT as ElasticViT,
    GlimpseConfig as GlimpseConfig,
    GlimpseReport as GlimpseReport,
    GlimpseWorld as GlimpseWorld,
    ReconstructionTask as ReconstructionTask,
    ReplayOptions as ReplayOptions,
    RewardOptions as RewardOptions,
    SegmentationTask as SegmentationTask,
    TrainingPlan as TrainingPlan,
    Trajectory as Trajectory,
)
from .lidar import (
    ColumnInterpolation as ColumnInterpolation,
    DepthCompletionMetrics as DepthCompletionMetrics,
    DepthCompletionModule as DepthCompletionModule,
    Dynamic as Dynamic,
    EstimationOptions as EstimationOptions,
    IPBasicCompletion as IPBasicCompletion,
    KittiDepthDataModule as KittiDepthDataModule,
    LidarKeys as LidarKeys,
    LidarSaSCallback as LidarSaSCallback,
    LidarSaSSelector as LidarSaSSelector,
    LightDepthCompletionNet as LightDepthCompletionNet,
    LineDropout as LineDropout,
    LineGameOptions as LineGameOptions,
    LineSelection as LineSelection,
    PullPushCompletion as PullPushCompletion,
    SparseToDenseResNet as SparseToDenseResNet,
    Spread as Spread,
    SyntheticLidarDataModule as SyntheticLidarDataModule,
    line_shapley as line_shapley,
)
from .models import (
    ImageClassifier as ImageClassifier,
    LeNet as LeNet,
    SmallCNN as SmallCNN,
    SmallResNet as SmallResNet,
)
from .moe import (
    AuxLossScale as AuxLossScale,
    BalanceBiasUpdater as BalanceBiasUpdater,
    ChinchillaLaw as ChinchillaLaw,
    ComputePlanner as ComputePlanner,
    DecoderConfig as DecoderConfig,
    DecoderLM as DecoderLM,
    ExpertLoad as ExpertLoad,
    ExpertLoadMonitor as ExpertLoadMonitor,
    FineGrainedMoE as FineGrainedMoE,
    FineGrainedMoELaw as FineGrainedMoELaw,
    MoEConfig as MoEConfig,
    MoEScalingModule as MoEScalingModule,
    ReplaceFFN as ReplaceFFN,
    RunRecorder as RunRecorder,
    fit_scaling_law as fit_scaling_law,
    replace_ffn as replace_ffn,
    total_aux_loss as total_aux_loss,
)
from .privacy import (
    DPGradientDropDDPStrategy as DPGradientDropDDPStrategy,
    DPGradientDropStrategy as DPGradientDropStrategy,
    DPPrePruneCallback as DPPrePruneCallback,
    PerSampleEngine as PerSampleEngine,
    PrivateTrainingOptions as PrivateTrainingOptions,
    RateSchedule as RateSchedule,
    SelectionPlan as SelectionPlan,
    check_sample_isolation as check_sample_isolation,
    register_rule as register_rule,
)
from .pruning import (
    Allocation as Allocation,
    Calibration as Calibration,
    ChannelGame as ChannelGame,
    DirichletOptions as DirichletOptions,
    DirichletPosterior as DirichletPosterior,
    DirichletPruneCallback as DirichletPruneCallback,
    GameOptions as GameOptions,
    Layers as Layers,
    RandomChannelPruningCallback as RandomChannelPruningCallback,
    Repair as Repair,
    Schedule as Schedule,
    Search as Search,
    ShapleyPruningCallback as ShapleyPruningCallback,
    StructuredPruningCallback as StructuredPruningCallback,
    compare_criteria as compare_criteria,
    dirichlet_kl as dirichlet_kl,
    dirichlet_scores as dirichlet_scores,
)
from .reporting import (
    Report as Report,
)
from .surgery import (
    ChannelGraph as ChannelGraph,
    PruningPlan as PruningPlan,
    apply_plan as apply_plan,
    export_model as export_model,
    load_pruned as load_pruned,
    profile as profile,
    prunable as prunable,
    save_pruned as save_pruned,
)
from .synthesis import (
    DPNTKGenerator as DPNTKGenerator,
    FeatureOptions as FeatureOptions,
    MatchingOptions as MatchingOptions,
    ReleaseOptions as ReleaseOptions,
    SynthesisFigures as SynthesisFigures,
    SyntheticData as SyntheticData,
    SyntheticDataWriter as SyntheticDataWriter,
    TableSchema as TableSchema,
    TabularDataModule as TabularDataModule,
    release_mean_embedding as release_mean_embedding,
)

__version__: str
