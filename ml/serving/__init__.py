"""One replica of the model's HTTP service: `python -m ml.serve`.

`server` starts and drains, `app` routes, `bodies` reads requests within limits, `inference` turns bytes into an answer,
`workers` bounds how many at once, `prediction_log` and `spool` keep what was answered, `metrics` counts.
"""
