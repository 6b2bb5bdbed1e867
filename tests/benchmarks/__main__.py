"""`make bench`: every measurement, one after the other, each beside its peer or limit."""

from __future__ import annotations

from tests.benchmarks import bench_cli, bench_gateway, bench_judge, bench_release, bench_serving, bench_training

for bench in (bench_cli, bench_training, bench_serving, bench_gateway, bench_judge, bench_release):
    print(f"\n== {bench.__name__.rpartition('.')[2]}: {(bench.__doc__ or '').strip().splitlines()[0]}", flush=True)
    bench.main()
