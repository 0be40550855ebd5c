"""Stage `report_plots`: the pictures of a report. They show what was decided and nothing of the run, so a cached run draws none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.core.stage import StageConfig, stage
from tasks.plot_files import write_plots


class ReportPlotsConfig(StageConfig):
    """Nothing to choose: the plots show what is there."""


@stage("report_plots", version=2, libraries=("matplotlib",), isolated=False, varies="it shows what was measured")
def report_plots(config: ReportPlotsConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Draw the plots of `inputs["decision"]`."""
    from tasks.plots import draw_plots
    from tasks.rendering import json_safe

    plots = draw_plots(json_safe(json.loads((inputs["decision"] / "decision.json").read_text(encoding="utf-8"))))
    write_plots(plots, out_dir)
    return {"plots": len(plots)}
