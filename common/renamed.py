"""Map old names of options, metrics and files to the current ones, for earlier runs and commands.

Files of a run are read under either name and written under the new one.
"""

OPTIONS = {
    "answers_per_prompt": "num_generations",
    "bupo_arm": "bupo_baseline",
    "comparison": "baseline",
    "keep": "save_total_limit",
}
METRICS = {
    "all_right": "all_correct",
    "dead_groups": "zero_std_groups",
    "dead_updates": "no_signal_updates",
    "needed_share": "useful_token_fraction",
    "not_filled": "unfilled_groups",
    "right": "correct",
}
SAMPLES = {"answer": "response", "truth": "reference_answer"}
STATE = {"drawn": "prompts_consumed", "origin": "fingerprints"}


def with_new_names(row, names):
    """Return a dictionary whose keys have their new names; a new name that is there counts."""
    if row.keys().isdisjoint(names):
        return row
    return {names[k]: v for k, v in row.items() if k in names} | {
        k: v for k, v in row.items() if k not in names
    }


def with_old_names(row, names):
    """Return a dictionary whose keys have their old names."""
    old = {new: before for before, new in names.items()}
    return {old.get(k, k): v for k, v in row.items()}
