"""Multi-task gain: how much a multi-task model improves on single-task models (Maninis et al., CVPR 2019)."""

from collections.abc import Mapping


def delta_m(multi: Mapping[str, float], single: Mapping[str, float],
            higher_is_better: Mapping[str, bool]) -> float:
    """Mean over tasks of the relative change, in percent; positive = the multi-task model is better.

    multi, single: task -> its primary figure, in the same unit; higher_is_better: task -> direction of that
    figure. The single-task figures must belong to the same backbone to be comparable.
    """
    if not multi or set(multi) != set(single):
        raise ValueError(f"delta_m needs the same tasks twice, got {sorted(multi)} and {sorted(single)}")
    unknown = set(multi) - set(higher_is_better)
    if unknown:
        raise ValueError(f"no direction (higher is better) for {sorted(unknown)}; "
                         f"known: {sorted(higher_is_better)}")
    zero = [task for task, value in single.items() if value == 0]
    if zero:
        raise ValueError(f"the single-task figure of {', '.join(zero)} is 0: no relative change")
    gains = [(value - single[task]) / single[task] * (1 if higher_is_better[task] else -1)
             for task, value in multi.items()]
    return 100 * sum(gains) / len(gains)
