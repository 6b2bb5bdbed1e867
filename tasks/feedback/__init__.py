"""Feedback: labels that people give predictions afterwards. `labels` reads files of them, `predictions` finds what was
answered, `store` keeps both in Postgres."""
