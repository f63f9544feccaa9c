"""No circle of imports between modules; `lint-imports` checks layers, and circles between packages."""

from __future__ import annotations

import graphlib

import pytest

grimp = pytest.importorskip("grimp", reason="the import graph needs import-linter of the dev extra")


def test_no_circle_between_modules() -> None:
    graph = grimp.build_graph("mindomni_rt", "mindomni_rt.kernels", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150 and imports["mindomni_rt.kernels.swiglu"]
    circles = []
    while True:  # each circle found is cut at an import, so that one run names them all
        try:
            graphlib.TopologicalSorter(imports).prepare()
            break
        except graphlib.CycleError as error:
            circle = list(reversed(error.args[1]))
            circles.append(" -> ".join(circle))
            imports[circle[0]] = imports[circle[0]] - {circle[1]}
    assert not circles, "\n".join(circles)
