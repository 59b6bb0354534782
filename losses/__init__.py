"""Training losses: one file per family, their sum over tasks in `multi_task`, the balance of tasks in `balancing`."""
