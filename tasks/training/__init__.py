"""Training, export and evaluation as child processes: torch never lives in the flow's own process."""
