"""What cost grows with: laws that carry figures to larger sizes, the page they are written to, and measurements at tiny sizes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs import bench_scale, bench_scale_report, bench_scale_servers, bench_scale_stages
from docs.bench_scale import PAGE, PLANS, Plan, read, wanted, work
from docs.bench_scale_report import BILLIONS, DIMENSIONS, adapter, exponent, fit, foretold, pooled, shown, table, write
from docs.bench_scale_stages import QUICK, SHAPES, SMALLEST, Bench
from tasks.core import hardware, settings
from tasks.core.child import FORKS
from tasks.domain.errors import UserError

CONDITIONS = {
    "day": "2026-11-26", "wall_s": 1.0, "cpu": "some CPU", "cores": 2, "precision": "fp32", "others_cores": 0.25, "stolen_cores": 0.5,
    "hardware": hardware.hardware_class(),
}  # fmt: skip


def record(dimension: str, size: int, repeat: int = 0, **samples: list[float]) -> dict[str, Any]:
    x = SHAPES[size].x() if dimension == "model" else {"size": size}
    return {"dimension": dimension, "size": size, "repeat": repeat, "x": x, "samples": samples, "conditions": CONDITIONS}


def polled(size: int, ms: float) -> dict[str, Any]:
    """Workers whose polls take so long, on a server that needs 0.1 cores and 0.02 for each of them."""
    return record("workers", size, poll_ms=[ms, ms, ms], write_ms=[5.0], server_cores=[0.1 + 0.02 * size], server_mb=[200.0 + size])


@pytest.fixture
def bench(home: Path) -> Iterator[Bench]:
    home.mkdir(parents=True)
    yield Bench(replace(settings.load_settings(), store_uri=(home / "store").as_uri()), replace(QUICK, steps=4, window_s=2.0, children=3))
    FORKS.close()


@pytest.mark.fast
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_known_power_law_is_found_and_carried_on(power: float) -> None:
    xs = [10.0, 30.0, 100.0]
    ys = [3 * x**power for x in xs]
    law = fit("power", xs, ys)
    assert exponent(xs, ys) == pytest.approx(power) and law == pytest.approx((0, 3, power))
    assert law.at(1e6) == pytest.approx(3 * 1e6**power)


@pytest.mark.fast
def test_a_fixed_cost_does_not_bend_what_is_linear_and_nothing_is_less_than_free() -> None:
    xs = [10.0, 30.0, 100.0]
    law = fit("linear", xs, [5 + 2 * x for x in xs])
    assert law == pytest.approx((5, 2, 1)) and law.at(1e6) == pytest.approx(2_000_005)
    assert exponent(xs, [5 + 2 * x for x in xs]) < 0.95  # carried on with this exponent, it would be less than half of that
    steeper = fit("linear", xs, [1.0, 4.0, 16.0])
    assert steeper.fixed == 0 and steeper.factor > 0
    falling = fit("linear", xs, [9.0, 8.0, 7.0])
    assert falling.factor == 0 and 7 < falling.fixed < 9
    linear = bench_scale_report.Series("synthesize_s", "synthesize")
    assert foretold(linear, xs, [5 + 2 * x for x in xs]) == pytest.approx(1)
    assert foretold(linear, xs, [25, 65, 820]) == pytest.approx(0.25)  # the last one is four times what the others say
    assert foretold(linear, xs[:2], [25, 65]) is None


@pytest.mark.fast
def test_a_doubled_size_is_reported_with_what_follows_from_it() -> None:
    records = [polled(1, 10), polled(2, 20), polled(2, 20)]
    told = table("workers", records)
    assert "| by polling workers | 1 | 2 | n | exponent | largest, from the others | 50 (extrapolated) |" in told
    assert "| a poll, ms | 10.0 | 20.0 | 3 to 6 | 1.00 |  | 500 |" in told
    assert "| the server's processor, cores | 0.120 | 0.140 | 1 to 2 | 0.22 |  | 1.10 |" in told
    assert "A worker costs 0.0200 cores; the server is one process, whose core would be full with 45 workers." in told
    assert "some CPU, 2 cores, fp32, 2026-11-26; other programs and the host took at most 0.75 cores." in told
    assert pooled(records, "workers", DIMENSIONS["workers"].series[0]) == {1: [10.0] * 3, 2: [20.0] * 6}
    assert table("rows", records) == "Not measured yet."


@pytest.mark.fast
@pytest.mark.slow
def test_the_page_has_a_place_for_every_dimension_and_keeps_what_stands_around_them(tmp_path: Path) -> None:
    template = PAGE.read_text(encoding="utf-8")
    page = write([polled(1, 10), polled(4, 11), polled(16, 14)], template, tmp_path)
    first = page.read_text(encoding="utf-8")
    assert "| a poll, ms | 10.0 |" in first and first.count("Not measured yet.") == len(DIMENSIONS) - 1
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling-workers.png"}
    assert 5_000 < (tmp_path / "scaling-workers.png").stat().st_size < bench_scale_report.LARGEST_PNG
    second = write([polled(1, 12), polled(4, 13), polled(16, 14)], first, tmp_path).read_text(encoding="utf-8")
    assert "| a poll, ms | 12.0 |" in second and "| a poll, ms | 10.0 |" not in second
    assert second.split("<!--")[0] == template.split("<!--")[0] and second.split("-->")[-1] == template.split("-->")[-1]
    with pytest.raises(ValueError, match="no place for workers"):
        write([], template.replace("figures of workers", "figures"), tmp_path)


@pytest.mark.fast
@pytest.mark.slow
def test_extrapolated_points_are_hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    drawn = []
    saved = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *args, **more: (drawn.append(self), saved(self, *args, **more)))
    bench_scale_report.plot("workers", [polled(1, 10), polled(4, 40)], tmp_path / "plot.png")
    lines = [line for axes in drawn[0].axes for line in axes.lines]
    hollow = {line.get_gid(): line for line in lines if line.get_markerfacecolor() == "none"}
    assert set(hollow) == {f"extrapolated {series.figure}" for series in DIMENSIONS["workers"].series}
    assert list(hollow["extrapolated poll_ms"].get_xdata()) == [50] and list(hollow["extrapolated poll_ms"].get_ydata()) == pytest.approx(
        [500]
    )
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in drawn[0].axes)


@pytest.mark.fast
def test_models_of_a_billion_weights_have_the_numbers_they_are_known_by() -> None:
    assert BILLIONS["1B"].parameters == 1_235_814_400 and BILLIONS["8B"].parameters == 8_030_261_248
    assert list(SHAPES)[-1] == 134_515_008
    # Layers in 4.5 bits, the head in 6.5625, and the embeddings of 8B once more in 4.5.
    assert BILLIONS["1B"].file_mb == pytest.approx(763, abs=2) and BILLIONS["8B"].file_mb == pytest.approx(4653, abs=2)
    assert adapter(BILLIONS["8B"], 16) == 41_943_040 and adapter(list(SHAPES.values())[-1], 16) == 4_884_480
    assert [shown(figure) for figure in (0, 0.01234, 1.234, 123.4, 12_345.6)] == ["0", "0.0123", "1.23", "123", "12,346"]


@pytest.mark.fast
def test_every_dimension_is_planned_and_drawn_and_its_sizes_take_turns() -> None:
    assert set(PLANS) == set(DIMENSIONS) and all(len(plan.sizes) >= 3 for plan in PLANS.values())
    assert list(wanted(["rows"], quick=False))[:4] == [("rows", 10_000, 0), ("rows", 30_000, 0), ("rows", 100_000, 0), ("rows", 10_000, 1)]


@pytest.mark.fast
@pytest.mark.slow
def test_what_is_in_the_file_is_not_measured_again_and_a_failure_does_not_stop_the_others(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measured = tmp_path / "scaling.jsonl", []

    def rows(bench: Bench, size: int, repeat: int) -> bench_scale_stages.Samples:
        measured.append(size)
        if size == 2:
            raise RuntimeError("broken on purpose")
        return {"synthesize_s": [size / 3], "synthesize_mb": [1.0], "file_mb": [1.0]}

    monkeypatch.setitem(PLANS, "rows", Plan(rows, (1, 2, 3), (1, 2), 1))
    todo = list(wanted(["rows"], quick=False))
    records, failed = work(bench, output, todo)
    assert measured == [1, 2, 3] and failed == ["rows 2: broken on purpose"] and [r["size"] for r in records] == [1, 3]
    assert read(output) == records and records[1]["samples"]["synthesize_s"] == [1.0] and records[0]["samples"]["synthesize_s"] == [0.33333]
    work(bench, output, todo)
    assert measured == [1, 2, 3, 2]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "words"),
    [("{}", "has no measurement in line 2"), ("[1]", "has no measurement in line 2"), ("x", "has no measurement in line 2"),
     (json.dumps({"conditions": {"hardware": "an abacus"}}), "was measured on another machine (an abacus). Delete the file")],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "scaling.jsonl"
    path.write_text(f"{json.dumps(polled(1, 10))}\n{line}\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert words in str(error.value)


@pytest.mark.thorough
def test_rows_and_models_are_measured_at_tiny_sizes(bench: Bench) -> None:
    once, twice = (bench_scale.measure(bench, "rows", size, 0)["samples"] for size in (48, 96))
    assert twice["file_mb"][0] == pytest.approx(2 * once["file_mb"][0], rel=0.25) and once["synthesize_mb"][0] > 50
    model = bench_scale_stages.model(bench, SMALLEST.parameters, 0, {SMALLEST.parameters: SMALLEST})
    assert len(model["train_ms"]) == 2 and all(min(values) > 0 for values in model.values())  # four steps, of which two warm up
    assert SMALLEST.file_mb < model["gguf_mb"][0] < SMALLEST.file_mb + 3  # and the vocabulary


@pytest.mark.thorough
def test_variants_and_languages_are_measured_at_tiny_sizes(bench: Bench) -> None:
    made = bench_scale_stages.variants(bench, 2, 0)
    assert [len(made[part]) for part in ("quantize_s", "check_s", "evaluate_s", "benchmark_s", "all_s", "disk_mb")] == [2, 2, 2, 2, 1, 1]
    assert made["all_s"][0] == pytest.approx(sum(sum(made[part]) for part in ("quantize_s", "check_s", "evaluate_s", "benchmark_s")))
    assert all(len(values) == 1 for values in bench_scale_stages.languages(bench, 2, 0).values())


@pytest.mark.thorough
def test_workers_that_poll_and_records_of_mlflow_are_measured_on_real_servers(bench: Bench) -> None:
    found = bench_scale_servers.workers(bench, 2, 0)
    assert found["poll_ms"] and len(found["write_ms"]) >= 1 and found["server_mb"][0] > 50 and found["server_cores"][0] > 0
    for size in (4, 50):
        written = bench_scale_servers.mlflow(bench, size, 0)
        assert len(written["child_ms"]) == len(written["parent_ms"]) == 3
        assert bench_scale_servers.runs_in(bench.places.home / "mlflow-scale.db") == size + 6
    with contextlib.closing(sqlite3.connect(bench.places.home / "mlflow-scale.db")) as connection:
        metrics = {n for (n,) in connection.execute("SELECT count(*) FROM metrics GROUP BY run_uuid")}
        parents = "SELECT count(*) FROM tags t JOIN runs r ON r.run_uuid = t.value WHERE t.key = 'mlflow.parentRunId'"
        children = connection.execute("SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId'").fetchone()
        assert len(metrics) == 1 and connection.execute(parents).fetchone() == children == (
            39,
        )  # ten copies of the first three, and nine written
