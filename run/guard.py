"""Guard a run: report jumps of metrics, count bad steps, and let SIGINT end it between steps."""

import signal

ALARM_FACTOR = 4.0  # factor between a watched metric and its running mean that prints a warning
WATCHED = {  # metric: (name, advice if it jumps up, advice if it falls)
    "grad_norm": (
        "gradient norm",
        "one such step is harmless, since it is clipped; if they go on, lower --lr",
        "look at zero_std_groups: few groups are left to learn from",
    ),
    "entropy": (
        "entropy",
        "the policy becomes random; lower --lr",
        "the policy becomes deterministic; if reward falls too it collapses: lower --lr, or raise "
        "--clip-high",
    ),
    "response_length": (
        "response length",
        "look at clipped_ratio and samples.jsonl: do responses not end? lower --lr, or try "
        "--overlong-buffer",
        "look at samples.jsonl: do responses still answer? lower --lr if reward falls too",
    ),
}


class Guard:
    """Reports jumps of metrics, and counts the bad steps in a row.

    (engine/engine.py skips the optimizer step if a loss or gradient is NaN or infinite.)
    """

    def __init__(self, say):
        self.say, self.bad_in_a_row, self.means = say, 0, {}
        self.away = set()  # watched metrics that are off their mean and have been reported

    def bad_step(self, reason):
        self.bad_in_a_row += 1
        self.say(f"warning: bad step ({reason}), {self.bad_in_a_row} in a row")

    def good_step(self, metrics):
        """Compare a step's metrics with the running means of earlier steps; warn about jumps."""
        self.bad_in_a_row = 0
        for key, (name, above, below) in WATCHED.items():
            if key == "grad_norm" and not metrics.get("updates", 1):
                continue  # no group had reward variance; the step's console line shows this
            if key not in metrics:
                continue
            value, mean, step = metrics[key], self.means.get(key), metrics["step"]
            if mean is None:
                self.means[key] = value
                continue
            low, high = mean / ALARM_FACTOR, mean * ALARM_FACTOR
            known = step > 10 and mean > 1e-3
            if known and not low < value < high:
                if key not in self.away:
                    self.say(
                        f"warning: {name} {value:.3g} at step {step}, {value / mean:.1f} times its "
                        f"running mean {mean:.3g}; {above if value > mean else below}"
                    )
                self.away.add(key)
            else:
                self.away.discard(key)
            if known:  # clip outliers, so that one spike does not trigger further warnings
                value = min(max(value, low), high)
            self.means[key] = 0.9 * mean + 0.1 * value

    def state(self):
        away = sorted(self.away)
        return {"bad_in_a_row": self.bad_in_a_row, "means": self.means, "away": away}

    def restore(self, state):
        self.bad_in_a_row, self.means = state["bad_in_a_row"], dict(state["means"])
        self.away = set(state.get("away", ()))


class StopRequest:
    """While open, a first SIGINT or SIGTERM sets `asked`, so that the run saves after its step.

    A second SIGINT interrupts the run at once.
    """

    def __init__(self, say):
        self.say, self.asked, self.before = say, False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        self.say(
            f"{signal.Signals(number).name}: finishing this step, then saving and leaving "
            "(Ctrl-C twice leaves at once)"
        )
