"""The agent on a GPU: the same states, nothing that waits for it, a replay buffer that goes along."""

import copy

import pytest
import torch
from glimpse.agents import fill, ragged, small_sac, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(**options):
    sac = small_sac(**options)
    fill(sac.replay_buffer)
    sac.move_to("cuda")
    return sac


def test_states_have_the_vectors_that_they_have_on_the_cpu():
    here, there, states = small_sac(), small_sac(), ragged([4, 0, 12])
    there.move_to("cuda")
    torch.testing.assert_close(there.act(states, True).cpu(), here.act(states, True), atol=1e-3, rtol=0)


@pytest.mark.parametrize("update", ["fused", "sb3"])
def test_updates_move_every_network_and_wait_for_nothing(update):
    sac = on_gpu(update=update)
    sac.train(2, 16)
    before = copy.deepcopy(sac.policy)
    batch = sac.replay_buffer.draw(16)
    step = sac._update_fused if update == "fused" else sac._update_in_turn
    torch.cuda.set_sync_debug_mode("error")
    try:
        sac.replay_buffer.draw(16)
        step(batch)
        sac._follow()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("actor", "critic", "critic_target"):
        pairs = zip(getattr(before, name).parameters(), getattr(sac.policy, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(before.log_ent_coef, sac.log_ent_coef)


def test_drawn_transitions_are_those_of_a_buffer_on_the_cpu():
    here, there = small_sac(), small_sac()
    for sac in (here, there):
        fill(sac.replay_buffer)
    there.move_to("cuda")
    a, b = here.replay_buffer.draw(20), there.replay_buffer.draw(20)
    assert b.next_observations.device.type == "cuda"
    assert torch.equal(a.next_observations.latents, b.next_observations.latents.cpu())
    assert torch.equal(a.rewards, b.rewards.cpu())
    saved, moved = here.replay_buffer.state_dict(), there.replay_buffer.state_dict()
    assert all(torch.equal(torch.as_tensor(saved[key]), torch.as_tensor(moved[key])) for key in saved)


def test_steps_on_the_gpu_enter_the_buffer():
    sac = on_gpu()
    state = tokens(8, 4).to("cuda")
    sac.replay_buffer.add_step(state, sac.act(state), torch.zeros(8, device="cuda"), torch.zeros(8, device="cuda"))
    assert sac.replay_buffer.size() == 80  # a batch of 24 has left 96, and 8 have come
