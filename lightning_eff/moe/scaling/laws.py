"""What loss a network of a given size reaches after a given number of tokens.

Chinchilla's law, arXiv 2203.15556, and the joint law of size, tokens and granularity for fine-grained mixtures of
experts, arXiv 2402.07871. Loss in nats a token; sizes without embeddings where the source counts them so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_eff.documents import parsed, reading, write_text

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """L(N, D) = c + A/N^alpha + b/D^beta; the two laws differ in A.

    Args:
        a: coefficient of the size term.
        alpha: exponent of the number of parameters N.
        b: coefficient of the data term.
        beta: exponent of the number of training tokens D.
        c: loss in nats a token that neither size nor tokens remove.
        expansion_rate: E of the networks it was fitted to, 1 for dense ones; None if not known.
        fitted_flops: least and most training FLOPs of a run it was fitted to; None if not known.
        source: where the coefficients come from.

    Raises:
        ValueError: a coefficient is not a finite number.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    expansion_rate: float | None = None
    fitted_flops: tuple[float, float] | None = None
    source: str = ""

    #: Names of the coefficients, in the order in which tables tell them.
    parameters: ClassVar[tuple[str, ...]] = ("a", "alpha", "b", "beta", "c")

    def __post_init__(self) -> None:
        for name, value in self.coefficients.items():
            if not math.isfinite(value):
                raise ValueError(f"expected finite coefficients, got {name} = {value}")

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients by name."""
        return {name: getattr(self, name) for name in self.parameters}

    def size_coefficient(self, granularity: float = 1.0) -> float:
        """A, what the size term has above N^alpha."""
        raise NotImplementedError

    @overload
    def __call__(self, n_total: float, n_tokens: float, granularity: float = 1.0) -> float: ...
    @overload
    def __call__(self, n_total: ArrayLike, n_tokens: ArrayLike, granularity: ArrayLike = 1.0) -> Floats: ...
    def __call__(self, n_total: ArrayLike, n_tokens: ArrayLike, granularity: ArrayLike = 1.0) -> float | Floats:
        """Predict the loss.

        Args:
            n_total: N, all parameters that are no embedding, without routers; > 0.
            n_tokens: D, training tokens; > 0.
            granularity: G, >= 1; a law without granularity takes it and does not look at it.

        Returns:
            Loss in nats a token, in the shape the arguments broadcast to.

        Raises:
            ValueError: an argument lies outside its range.
        """
        n, d, g = (np.asarray(value, dtype=np.float64) for value in (n_total, n_tokens, granularity))
        for name, value, least in (("n_total", n, 0.0), ("n_tokens", d, 0.0)):
            if not (value > least).all():
                raise ValueError(f"{name} must be > {least:g}, got {value.min() if value.size else value}")
        if not (g >= 1).all():
            raise ValueError(f"granularity must be >= 1, got {g.min()}")
        size, data = np.exp(-self.alpha * np.log(n)), np.exp(-self.beta * np.log(d))
        loss: Floats = np.asarray(self.c + self._size_coefficients(g) * size + self.b * data)
        return loss if loss.ndim else float(loss)

    def _size_coefficients(self, granularity: Floats) -> Any:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain Python; :func:`law_from_dict` reads it."""
        return {"law": _NAMES[type(self)], **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, which :func:`load_law` reads; folders are made."""
        return write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(ScalingLaw):
    """L(N, D) = c + a/N^alpha + b/D^beta, for dense networks, or for mixtures of one granularity and expansion rate.

    Args:
        granularity: G of the networks it was fitted to; None if they had several, or none.

    Example:
        >>> round(ChinchillaLaw.paper_dense()(1e9, 2e10), 6)
        2.980305
    """

    granularity: float | None = None

    def size_coefficient(self, granularity: float = 1.0) -> float:
        """A = a, whatever the granularity."""
        return self.a

    def _size_coefficients(self, granularity: Floats) -> Any:
        return self.a

    @classmethod
    def paper_dense(cls) -> Self:
        """The dense networks of arXiv 2402.07871: C4, GPT-2 tokens, N without embeddings."""
        return cls(
            a=16.3,
            alpha=0.126,
            b=26.7,
            beta=0.127,
            c=0.47,
            expansion_rate=1,
            fitted_flops=(3.02e17, 1.95e19),
            source="arXiv 2402.07871, dense",
        )

    @classmethod
    def chinchilla2022(cls) -> Self:
        """The third approach of arXiv 2203.15556: MassiveText, N with embeddings."""
        return cls(a=406.4, alpha=0.34, b=410.7, beta=0.28, c=1.69, expansion_rate=1, source="arXiv 2203.15556")

    @classmethod
    def replication2024(cls) -> Self:
        """The same runs, fitted again by arXiv 2404.10102."""
        return cls(
            a=482.01, alpha=0.3478, b=2085.43, beta=0.3658, c=1.8172, expansion_rate=1, source="arXiv 2404.10102"
        )


@dataclass(frozen=True, kw_only=True)
class FineGrainedMoELaw(ScalingLaw):
    """L(N, D, G) = c + (g/G^gamma + a)/N^alpha + b/D^beta.

    It has no term for the expansion rate E: coefficients hold for the E they were fitted at.

    Args:
        g: coefficient of the granularity term.
        gamma: exponent of the granularity G.

    Example:
        >>> law = FineGrainedMoELaw.paper()
        >>> round(law(1e9, 2e10, granularity=1), 6), round(law(1e9, 2e10, granularity=8), 6)
        (3.276133, 3.140393)
    """

    g: float
    gamma: float

    parameters: ClassVar[tuple[str, ...]] = ("a", "alpha", "b", "beta", "g", "gamma", "c")

    def size_coefficient(self, granularity: float = 1.0) -> float:
        """A_G = a + g G^-gamma."""
        return self.a + self.g * math.pow(granularity, -self.gamma)

    def _size_coefficients(self, granularity: Floats) -> Any:
        return self.a + self.g * granularity**-self.gamma

    def at(self, granularity: float) -> ChinchillaLaw:
        """The law of the networks of one granularity."""
        shared = {field.name: getattr(self, field.name) for field in fields(ScalingLaw)}
        return ChinchillaLaw(**{**shared, "a": self.size_coefficient(granularity)}, granularity=granularity)

    @classmethod
    def paper(cls, expansion_rate: int = 64) -> Self:
        """The coefficients of arXiv 2402.07871: C4, GPT-2 tokens, expert choice, N without embeddings and routers.

        Args:
            expansion_rate: 64 (its main study) or 16.

        Raises:
            ValueError: another expansion rate, for which nothing was published.
        """
        if expansion_rate == 64:
            return cls(
                a=18.1,
                alpha=0.115,
                b=30.8,
                beta=0.147,
                g=2.1,
                gamma=0.58,
                c=0.47,
                expansion_rate=64,
                fitted_flops=(3.17e17, 2.10e19),
                source="arXiv 2402.07871, E = 64",
            )
        if expansion_rate == 16:
            return cls(
                a=19.64,
                alpha=0.124,
                b=57.07,
                beta=0.169,
                g=1.18,
                gamma=0.986,
                c=0.472,
                expansion_rate=16,
                fitted_flops=(1.52e17, 5.47e18),
                source="arXiv 2402.07871, E = 16",
            )
        raise ValueError(
            f"coefficients were published for expansion rates 16 and 64, got {expansion_rate}: fit a law to runs of "
            "your own with fit_scaling_law"
        )

    @classmethod
    def paper_holdout(cls) -> Self:
        """As :meth:`paper`, fitted without the fifth of the runs that has the lowest losses."""
        return cls(
            a=17.6,
            alpha=0.114,
            b=26.7,
            beta=0.140,
            g=2.07,
            gamma=0.570,
            c=0.472,
            expansion_rate=64,
            source="arXiv 2402.07871, E = 64, without the lowest losses",
        )


_NAMES: dict[type[ScalingLaw], str] = {ChinchillaLaw: "chinchilla", FineGrainedMoELaw: "fine_grained"}

#: Published laws by the name :func:`load_law` knows them by.
PRESETS = {
    "moe64": FineGrainedMoELaw.paper,
    "moe16": lambda: FineGrainedMoELaw.paper(16),
    "moe64_holdout": FineGrainedMoELaw.paper_holdout,
    "dense": ChinchillaLaw.paper_dense,
    "chinchilla2022": ChinchillaLaw.chinchilla2022,
    "replication2024": ChinchillaLaw.replication2024,
}


def law_from_dict(state: Mapping[str, Any]) -> ScalingLaw:
    """Make the law that :meth:`ScalingLaw.to_dict` told of.

    Raises:
        ValueError: a coefficient is missing, a name unknown or the kind of law.
    """
    kinds = {name: kind for kind, name in _NAMES.items()}
    values = parsed(dict[str, Any], state, "the law")
    kind = values.pop("law", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"expected a law of {sorted(kinds)}, got {kind!r}")
    law: ScalingLaw = parsed(kinds[kind], values, f"the coefficients of a {kind} law")
    return law


def load_law(name_or_path: str | Path) -> ScalingLaw:
    """Return a published law by name, or read one that :meth:`ScalingLaw.save` or ``FitResult.save`` wrote.

    Args:
        name_or_path: one of ``moe64``, ``moe16``, ``moe64_holdout``, ``dense``, ``chinchilla2022``,
            ``replication2024``, or a JSON file.

    Raises:
        ValueError: neither a name nor a file, or a file that holds no law.
    """
    if name_or_path in PRESETS:
        return PRESETS[str(name_or_path)]()
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"expected a file or one of {', '.join(PRESETS)}, got {str(name_or_path)!r}")
    with reading(f"{path} holds no scaling law"):
        state = json.loads(path.read_text(encoding="utf-8"))
        return law_from_dict(state["law"] if isinstance(state["law"], dict) else state)
