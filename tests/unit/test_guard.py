"""What stops a run, and what counts as a loss spike, on simulated loss curves. Run: pytest tests/unit/test_guard.py"""

import json
import math

import numpy as np
import pytest

from sft import guard
from sft.config import GuardSection
from sft.errors import GuardStop
from sft.guard import Guard, Spike

DEFAULTS = GuardSection()
STEPS = 10_000
EPOCHS = 3
WARMUP = 100


def curve(docs, steps=STEPS, epochs=EPOCHS, seed=0, tail=0.1):
    """Mean losses of steps that hold `docs` documents each, and the steps per epoch.

    Documents have lognormal lengths (median 81 labels) and difficulties (sigma 0.4); a mean over few labels is noisier.
    The loss of the whole stays up in warm-up, falls over some hundred steps, drops as each further epoch begins and
    rises by 5 % within it. The last step of an epoch holds only `tail` of the documents.
    """
    random = np.random.RandomState(seed)
    per_epoch = steps // epochs
    step = np.arange(steps)
    level = 1.1 + 1.4 * np.exp(-np.maximum(0, step - WARMUP) / 60)
    epoch = step // per_epoch
    level *= 0.7 ** np.minimum(epoch, 5) * (1 + 0.05 * (epoch > 0) * (step % per_epoch) / per_epoch)
    losses = []
    for i in range(steps):
        count = docs if (i + 1) % per_epoch else max(1, int(docs * tail))
        labels = np.clip(random.lognormal(4.4, 0.9, count), 1, 2000)
        own = random.lognormal(-0.08, 0.4, count) * np.abs(1 + 1.2 / np.sqrt(labels) * random.standard_normal(count))
        losses.append(float(level[i] * (labels * own).sum() / labels.sum()))
    return losses, per_epoch


def judged(losses, per_epoch, settings=DEFAULTS, history=()):
    """All spikes of a run; gradient norms differ from step to step."""
    made = Guard(settings, per_epoch, history)
    first = history[-1][0] + 1 if history else 1
    found = [made.judge(first + i, loss, norm_of(first + i), applied=True) for i, loss in enumerate(losses)]
    return [spike for spike in found if spike]


def norm_of(step):
    return 1 + step / 7


def calm(number=200, level=1.0, noise=0.02, seed=0):
    return list(level * (1 + noise * np.random.RandomState(seed).standard_normal(number)))


@pytest.mark.parametrize("docs", [16, 64, 512])
def test_no_false_alarm_in_ten_thousand_steps_of_a_realistic_run(docs):
    losses, per_epoch = curve(docs)
    assert judged(losses, per_epoch) == []


def test_control_a_tighter_limit_alarms_on_the_same_run():
    losses, per_epoch = curve(16)
    assert len(judged(losses, per_epoch, GuardSection(spike_deviations=3))) > 20


@pytest.mark.parametrize(("docs", "times", "least"), [(64, 2, 0.9), (64, 3, 0.95), (512, 2, 1.0), (16, 3, 0.7)])
def test_planted_spikes_are_seen(docs, times, least):
    """In the last two thirds of the run, so that the fall of early training has left the window."""
    losses, per_epoch = curve(docs)
    planted = list(range(3500, STEPS, 130))
    for step in planted:
        losses[step - 1] *= times
    found = {spike.step: spike for spike in judged(losses, per_epoch)}
    seen = [step for step in planted if step in found]
    assert len(seen) / len(planted) >= least
    assert set(found) <= set(planted)
    assert all(found[step].rule == "window" and found[step].loss == losses[step - 1] for step in seen)


def test_a_spike_while_the_loss_still_falls_must_be_larger():
    """The spread of the window holds the fall as well: x5 is seen there, x2 is not (a known limit)."""
    for times, expected in ((2, []), (5, [180])):
        losses, per_epoch = curve(512, steps=300, epochs=1)
        losses[179] *= times
        assert [spike.step for spike in judged(losses, per_epoch)] == expected


def test_the_memorised_end_of_many_epochs_is_calm():
    """Losses about 0.01 that differ by factors of ten: more than the spread, less than anyone would act on."""
    random = np.random.RandomState(0)
    losses = list(0.01 * random.lognormal(0, 0.7, 3000))
    assert judged(losses, 100) == []
    losses[1500] = 0.6
    assert [spike.step for spike in judged(losses, 100)] == [1501]


def test_control_without_the_least_spread_the_memorised_end_alarms(monkeypatch):
    monkeypatch.setattr(guard, "MIN_SPREAD", 0.0)
    assert judged(list(0.01 * np.random.RandomState(0).lognormal(0, 0.7, 3000)), 100) != []


def test_a_very_flat_loss_does_not_alarm_on_a_quarter(monkeypatch):
    losses = [*calm(noise=0.001, level=2.0), 2.5]
    assert judged(losses, 1000) == []
    monkeypatch.setattr(guard, "MIN_SPREAD_OF_MEDIAN", 0.0)
    assert [spike.step for spike in judged(losses, 1000)] == [201], "control"


def test_the_short_last_step_of_an_epoch_may_be_noisier(monkeypatch):
    losses, per_epoch = curve(128, steps=5000, epochs=100, tail=0.01)
    assert judged(losses, per_epoch) == []
    monkeypatch.setattr(guard, "LAST_STEP_ALLOWANCE", 1.0)
    without = judged(losses, per_epoch)
    assert without
    assert {spike.step % per_epoch for spike in without} == {0}, "control"


def test_spikes_do_not_poison_the_estimate():
    """A fifth of the window a hundred times too high: the next spike is seen, the limit hardly moved."""
    losses = calm(400)
    for step in range(200, 400, 5):
        losses[step] = 100.0
    made = Guard(DEFAULTS, 1000)
    for step, loss in enumerate(losses, 1):
        made.judge(step, loss, norm_of(step), applied=True)
    for step in range(401, 412):  # the rest after the alarms before
        made.judge(step, 1.0, norm_of(step), applied=True)
    spike = made.judge(412, 1.6, norm_of(412), applied=True)
    assert spike is not None
    assert spike.limit < 1.5
    assert spike.usual == pytest.approx(1.0, abs=0.02)


def test_a_lasting_shift_is_told_once_and_becomes_the_usual():
    losses = [*calm(200), *calm(300, level=2.0, seed=1)]
    assert [spike.step for spike in judged(losses, 1000)] == [201]
    again = [*losses, 4.0]
    assert [spike.step for spike in judged(again, 1000)] == [201, 501], "and the guard is awake at the new level"


def test_a_slow_rise_breaks_the_epoch_rule_alone():
    """0.4 % per step of a new epoch takes the window with it, but not the mean of the epoch before."""
    rising = [loss * 1.004**i for i, loss in enumerate(calm(150, seed=1))]
    losses = [*calm(200), *rising]
    spikes = judged(losses, 200)
    assert [spike.rule for spike in spikes] == ["epoch"]
    assert spikes[0].usual == pytest.approx(np.mean(losses[:200]))
    assert spikes[0].limit == pytest.approx(1.5 * np.mean(losses[:200]))
    assert judged(losses, 1000) == [], "control: the same losses, no whole epoch before"


@pytest.mark.parametrize(("known", "rules"), [(100, ["epoch"]), (99, [])])
def test_an_epoch_of_which_less_than_half_is_known_is_no_measure(known, rules):
    """A history that begins within the epoch, and a rise in the next."""
    losses = [*calm(known), *(1.004**i for i in range(150))]
    made = Guard(DEFAULTS, 200)
    found = [made.judge(201 - known + i, loss, norm_of(i), applied=True) for i, loss in enumerate(losses)]
    assert [spike.rule for spike in found if spike] == rules


def test_after_an_epoch_alarm_the_window_still_judges():
    losses = [*calm(200), *(1.004**i for i in range(120)), *calm(60, level=1.004**120, seed=2), 9.0]
    assert [spike.rule for spike in judged(losses, 200)] == ["epoch", "window"]


def test_a_restart_of_the_learning_rate_is_no_spike():
    """The loss climbs by a quarter in 30 steps, as after a warm restart of the schedule."""
    losses = [*calm(300), *(1 + 0.25 * i / 30 for i in range(30)), *calm(100, level=1.25)]
    assert judged(losses, 300) == []


def test_the_first_steps_are_not_judged_as_spikes():
    for number, expected in ((guard.MIN_SAMPLES - 1, []), (guard.MIN_SAMPLES, [guard.MIN_SAMPLES + 1])):
        assert [spike.step for spike in judged([*calm(number), 50.0], 1000)] == expected


def test_a_window_shorter_than_the_least_samples_works():
    assert [s.step for s in judged([*calm(8), 50.0], 1000, GuardSection(spike_window=8))] == [9]


def test_a_spike_reads_well():
    spike = judged([*calm(200), 3.0], 1000)[0]
    assert (
        str(spike) == f"step 201: loss 3 is above {spike.limit:.4g}; the median of the last steps is {spike.usual:.4g}"
    )
    assert "mean of the epoch before is 1.2" in str(Spike(7, 2.0, 1.2, 1.8, "epoch"))


def test_steps_that_are_not_finite_stop_the_run_at_the_limit():
    made = Guard(DEFAULTS, 100)
    for step, (loss, norm) in enumerate([(math.nan, math.nan), (1.0, math.inf)], 1):
        assert made.judge(step, loss, norm, applied=False) is None
    made.judge(3, 1.0, 1.0, applied=True)  # control: a good step between them starts the count anew
    made.judge(4, math.nan, math.nan, applied=False)
    made.judge(5, None, None, applied=False)  # nothing computed: neither counts nor resets
    made.judge(6, math.nan, math.nan, applied=False)
    with pytest.raises(GuardStop, match=r"^step 7: .*not finite 3 steps in a row.*learning rate.*damaged data[^\n]*$"):
        made.judge(7, math.nan, math.nan, applied=False)


def test_a_step_that_the_engine_did_not_take_counts_whatever_its_numbers():
    made = Guard(DEFAULTS, 100)
    made.judge(1, 1.0, 1.0, applied=False)
    made.judge(2, 50.0, 2.0, applied=False)
    with pytest.raises(GuardStop, match="3 steps in a row"):
        made.judge(3, 1.0, 3.0, applied=False)


def test_steps_without_labels_never_stop_a_run():
    made = Guard(DEFAULTS, 100)
    for step in range(1, 50):
        assert made.judge(step, None, None, applied=False) is None


def test_not_finite_numbers_stay_out_of_the_estimate():
    losses = calm(200)
    made, plain = Guard(DEFAULTS, 1000), Guard(DEFAULTS, 1000)
    for step, loss in enumerate(losses, 1):
        made.judge(2 * step, loss, norm_of(step), applied=True)
        made.judge(2 * step + 1, math.inf, math.nan, applied=False)
        plain.judge(2 * step, loss, norm_of(step), applied=True)
    spike = plain.judge(500, 3.0, 1.0, applied=True)
    assert spike is not None
    assert made.judge(500, 3.0, 1.0, applied=True) == spike


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)])
def test_a_step_taken_with_a_number_that_is_not_finite_stops_at_once(loss, norm):
    with pytest.raises(GuardStop, match="changed the weights though.*overlap_comm"):
        Guard(DEFAULTS, 100).judge(1, loss, norm, applied=True)


def test_a_loss_of_exactly_zero_stops():
    made = Guard(DEFAULTS, 100)
    for step, loss in enumerate([0.0, 0.0, 1e-30, 0.0, 0.0], 1):
        made.judge(step, loss, norm_of(step), applied=True)
    with pytest.raises(
        GuardStop, match=r"^step 6: the loss was exactly 0 in 3 steps in a row; usual causes: overlap_comm"
    ):
        made.judge(6, 0.0, 9.0, applied=True)


def test_a_gradient_norm_that_repeats_to_the_last_bit_stops():
    norm = 1.4142135
    near = math.nextafter(norm, 2)
    made = Guard(DEFAULTS, 100)
    for step, value in enumerate([norm, norm, near, norm, norm], 1):
        made.judge(step, 1.0 + step / 100, value, applied=True)
    with pytest.raises(GuardStop, match=r"^step 6: the gradient norm was exactly 1\.4142135 in 3 steps"):
        made.judge(6, 1.5, norm, applied=True)


def test_one_step_per_epoch_may_repeat_a_norm_but_not_zero():
    made = Guard(DEFAULTS, 1)
    for step in range(1, 30):
        assert made.judge(step, 1.0, 2.0, applied=True) is None
    for step in (30, 31):
        made.judge(step, 1.0, 0.0, applied=True)
    with pytest.raises(GuardStop, match="exactly 0.0"):
        made.judge(32, 1.0, 0.0, applied=True)


def eventful():
    """Losses with every kind of alarm, over several epochs of 150 steps."""
    losses = calm(900)
    losses[330] = losses[333] = losses[700] = 3.0
    losses[460:520] = [loss * 1.012**i for i, loss in enumerate(losses[460:520])]
    return losses


@pytest.mark.parametrize("cut", [1, 10, 150, 331, 332, 335, 465, 515, 700])
def test_a_resumed_run_judges_as_the_uninterrupted_one(cut):
    """The history goes through JSON, as it does in metrics.jsonl."""
    losses = eventful()
    whole = judged(losses, 150)
    assert {spike.rule for spike in whole} == {"window", "epoch"}
    history = [tuple(step) for step in json.loads(json.dumps([(i + 1, losses[i], norm_of(i + 1)) for i in range(cut)]))]
    assert judged(losses[cut:], 150, history=history) == [spike for spike in whole if spike.step > cut]


def test_control_without_its_history_a_resumed_run_judges_otherwise():
    losses = eventful()
    made = Guard(DEFAULTS, 150)
    found = [made.judge(i + 1, losses[i], norm_of(i + 1), applied=True) for i in range(325, 340)]
    assert not any(found)
    assert any(spike.step == 331 for spike in judged(losses, 150))


def test_the_counts_of_a_resumed_run_go_on():
    history = [(1, 1.0, 5.0), (2, 1.1, 5.0)]
    with pytest.raises(GuardStop, match="exactly 5.0"):
        Guard(DEFAULTS, 100, history).judge(3, 1.2, 5.0, applied=True)
    history = [(1, 1.0, 5.0), (2, math.nan, math.nan), (3, math.nan, math.nan)]
    with pytest.raises(GuardStop, match="3 steps in a row"):
        Guard(DEFAULTS, 100, history).judge(4, math.nan, 1.0, applied=False)
    assert Guard(DEFAULTS, 100, history[:2]).judge(4, math.nan, 1.0, applied=False) is None, "control"


@pytest.mark.parametrize("back_to", [0, 5, 150, 300, 330, 333, 600])
def test_after_a_rollback_nothing_later_is_remembered(back_to):
    losses = eventful()
    made = Guard(DEFAULTS, 150)
    for i in range(650):
        made.judge(i + 1, losses[i], norm_of(i + 1), applied=True)
    made.forget_after(back_to)
    again = [made.judge(i + 1, losses[i], norm_of(i + 1), applied=True) for i in range(back_to, 900)]
    assert [spike for spike in again if spike] == [spike for spike in judged(losses, 150) if spike.step > back_to]


def test_a_spike_that_comes_again_after_a_rollback_is_told_again():
    losses = [*calm(200), 3.0]
    made = Guard(DEFAULTS, 1000)
    for i, loss in enumerate(losses[:200]):
        made.judge(i + 1, loss, norm_of(i + 1), applied=True)
    first = made.judge(201, 3.0, 1.0, applied=True)
    assert made.judge(202, 3.0, 2.0, applied=True) is None, "control: the same spike"
    made.forget_after(200)
    assert first is not None
    assert made.judge(201, 3.0, 1.0, applied=True) == first
