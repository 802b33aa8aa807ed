"""Experiments: pages say what their rows say, sweeps resume, exact columns are the paper's."""

from __future__ import annotations

import dataclasses
import importlib
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effnetv2_jax.errors import InputError
from effnetv2_jax.models import specs
from effnetv2_jax.tools.tpu_compile import plan_of
from experiments import estimates, rank
from experiments.__main__ import experiments, index_table
from experiments.experiment import (
    EXACT,
    PROXY,
    SCALES,
    TPU_ESTIMATE,
    Experiment,
    Item,
    command,
    markdown,
    read_rows,
    write_tables,
)
from experiments.speed import run as speed
from experiments.tpu_compile import run as tpu_compile
from experiments.training import Spread

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
ALL = {experiment.name: experiment for experiment in experiments()}


def assert_shows(page: str, tables: dict[str, str]) -> None:
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, name


def test_the_tables_of_tpu_compile_are_those_of_its_rows():
    page = (EXPERIMENTS / "tpu_compile/README.md").read_text(encoding="utf-8")
    tables = tpu_compile.tables()
    assert len(tables) == 6
    assert_shows(page, tables)


def test_the_tables_of_speed_are_those_of_its_rows():
    page = (EXPERIMENTS / "speed/README.md").read_text(encoding="utf-8")
    tables = speed.tables(speed.read())
    assert len(tables) == 14
    assert_shows(page, tables)
    front_page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert_shows(front_page, {"speed": tables["summary"]})


@pytest.mark.parametrize("name", ALL)
def test_a_page_says_what_its_rows_say(name):
    experiment = ALL[name]
    rows = experiment.rows()
    page = (experiment.folder / "README.md").read_text(encoding="utf-8")
    assert_shows(page, experiment.tables(rows))
    assert f"python -m experiments.{name}" in page
    # Every row says where it comes from, and belongs to what the sweep measures today.
    known = {(item.scale, item.name) for item in experiment.items()}
    for row in rows:
        assert row.scale in SCALES and (row.scale, row.item) in known
        assert row.commit and row.host and row.versions and row.date and row.seconds
        assert not row.commit.endswith("-dirty"), f"{row.item}: commit, then measure again"
    for picture in experiment.folder.glob("*.png"):
        assert picture.name in page and picture.stat().st_size < 500_000


@pytest.mark.parametrize("name", ALL)
def test_what_takes_seconds_was_run(name):
    assert ALL[name].missing({EXACT}) == []


def test_the_index_is_that_of_the_experiments():
    page = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    assert_shows(page, {"paper": index_table()})
    for path in EXPERIMENTS.iterdir():
        if (path / "README.md").is_file():
            assert f"[{path.name}]({path.name})" in page


def test_one_experiment_from_nothing(tmp_path):
    committed = ALL["table03_fused"]
    shutil.copy(committed.folder / "README.md", tmp_path)
    experiment = dataclasses.replace(committed, folder=tmp_path)
    experiment.run(EXACT)
    experiment.draw()
    assert experiment.missing({EXACT}) == [] and experiment.missing({TPU_ESTIMATE})
    values = {(r.item, r.quantity): r.value for r in committed.rows() if r.scale == EXACT}
    assert {(r.item, r.quantity): r.value for r in experiment.rows()} == values
    page = (committed.folder / "README.md").read_text(encoding="utf-8")
    exact = {"exact": committed.tables(committed.rows())["exact"]}
    assert_shows(page, exact)
    assert_shows((tmp_path / "README.md").read_text(encoding="utf-8"), exact)


# ------------------------------------------------------------------------------- exact columns


# Exact to the digits that independent code bases count (torchvision, MMPretrain, timm): parameters,
# then multiply-adds in G at the inference size. Experiment, item, numbers, and the paper's, whose
# digits they are; a comment where they are not.
EXACT_COLUMNS = [
    ("table01_efficiency", "efficientnet-b6", 43_040_704, 19.068, "43", "19"),
    ("table03_fused", "efficientnet-b4", 19_341_616, 4.394, "19.3", None),  # 4.5; 4.2 in Table 7.
    ("table03_fused", "efficientnet-b4-fused-1-3", 19_944_398, 7.341, None, None),  # 20.0, 7.5
    ("table03_fused", "efficientnet-b4-fused-1-5", 43_361_152, 21.091, "43.4", None),  # 21.3
    ("table03_fused", "efficientnet-b4-fused-1-7", 131_954_632, 34.141, "132.0", None),  # 34.4
    ("table07_imagenet", "efficientnet-b3", 12_233_232, 1.827, "12", None),  # 1.9; timm has 1.87.
    ("table07_imagenet", "efficientnet-b4", 19_341_616, 4.394, "19", None),
    ("table07_imagenet", "efficientnet-b5", 30_389_784, 10.266, "30", "10"),
    ("table07_imagenet", "efficientnet-b6", 43_040_704, 19.068, "43", "19"),
    ("table07_imagenet", "efficientnet-b7", 66_347_960, 37.746, "66", "38"),
    # The paper's FLOPs are of its first version's networks, and its 22M and 120M are 21.5M and
    # 119.5M of the released README.
    ("table07_imagenet", "efficientnetv2-s", 21_458_488, 8.366, None, None),
    ("table07_imagenet", "efficientnetv2-m", 54_139_356, 24.582, "54", None),
    ("table07_imagenet", "efficientnetv2-l", 118_515_272, 56.080, None, None),
    ("table07_imagenet", "efficientnetv2-xl", 208_119_808, 93.353, "208", None),
    ("table07_imagenet", "EfficientNetV2-S, first arXiv version", 23_940_048, 8.598, "24", None),
    ("table10_same_training", "efficientnet-b7", 66_347_960, 37.746, "66", "38"),
    ("table10_same_training", "efficientnetv2-m", 54_139_356, 24.582, None, None),  # 55 of V1.
    ("table11_scaling_down", "efficientnet-b1", 7_794_184, 0.687, "7.8", "0.7"),
    ("table11_scaling_down", "efficientnetv2-b0", 7_139_704, 0.718, None, "0.7"),  # 7.4 printed.
    ("table11_scaling_down", "efficientnet-b2", 9_109_994, 0.994, "9.1", "1.0"),
    ("table11_scaling_down", "efficientnetv2-b1", 8_141_052, 1.197, "8.1", "1.2"),
    ("table11_scaling_down", "efficientnet-b4", 19_341_616, 4.394, "19", None),
    ("table11_scaling_down", "efficientnetv2-b3", 14_358_406, 3.0115, "14", "3.0"),
    ("table11_scaling_down", "efficientnet-b5", 30_389_784, 10.266, "30", None),  # 9.9; 10 there.
    ("table11_scaling_down", "efficientnetv2-s", 21_458_488, 8.366, None, None),
]


@pytest.mark.parametrize(
    ("name", "item", "parameters", "flops", "paper", "paper_flops"), EXACT_COLUMNS
)
def test_exact_columns(name, item, parameters, flops, paper, paper_flops):
    rows = ALL[name].rows()
    assert rows.find(item, "parameters", EXACT) == str(parameters)
    assert rows.number(item, "FLOPs, G", EXACT) == pytest.approx(flops, abs=5.1e-4)
    # To as many decimals as the paper prints.
    for quantity, printed in (("parameters, M", paper), ("FLOPs, G", paper_flops)):
        if printed is not None:
            decimals = len(printed.partition(".")[2])
            assert f"{rows.number(item, quantity, EXACT):.{decimals}f}" == printed


def test_every_network_that_is_counted_is_checked():
    checked = {(name, item) for name, item, *_ in EXACT_COLUMNS}
    for name in {name for name, _ in checked}:
        counted = {
            r.item
            for r in ALL[name].rows()
            if r.scale == EXACT and r.quantity == "parameters" and not r.item[0].isdigit()
        }
        assert counted == {item for other, item in checked if other == name}


def test_the_fused_rows_are_within_the_papers_own_excess():
    # The paper's FLOPs of Table 3 are 1 to 2.5 % above those of convolutions and classifier.
    table = importlib.import_module("experiments.table03_fused.__main__")
    for variant, paper in table.PAPER.items():
        rows = ALL["table03_fused"].rows()
        assert rows.number(variant, "parameters, M") == pytest.approx(paper[0], abs=0.061)
        assert 1.0 < paper[1] / rows.number(variant, "FLOPs, G") < 1.025


# --------------------------------------------------------------------------------- the harness


def sweep(folder: Path, names=("a", "b"), broken: str = "") -> tuple[Experiment, list[str]]:
    measured = []

    def item(name: str) -> Item:
        def measure():
            measured.append(name)
            if name == broken:
                raise InputError(f"{name} is broken: mend it.")
            return {"letters": len(name), "share": 1 / 3, "word": "out of memory"}

        return Item(EXACT if name != "z" else PROXY, name, measure, seed=7, packages=("numpy", "x"))

    experiment = Experiment(
        folder=folder,
        question="How long are names?",
        items=lambda: [item(name) for name in names],
        tables=lambda rows: {
            "names": markdown(
                ("name", "letters", "share"),
                [(n, rows.find(n, "letters"), rows.number(n, "share")) for n in names],
            )
        },
        answer=lambda rows: f"{len(rows)} rows",
        paper_runs=(("all", "python -m effnetv2_jax.main --config=configs/s.py --workdir=DIR"),),
    )
    (folder / "README.md").write_text("# ?\n\n<!-- names -->\n<!-- /names -->\nend\n")
    return experiment, measured


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, capsys):
    experiment, measured = sweep(tmp_path, ("a", "b", "c"), broken="b")
    assert command(experiment, []) == 2
    assert "error: b is broken: mend it." in capsys.readouterr().err
    assert measured == ["a", "b"] and "exact 1 of 3" in experiment.state()
    experiment, measured = sweep(tmp_path, ("a", "b", "c"))
    assert command(experiment, []) == 0
    assert measured == ["b", "c"]
    assert "[1/2]" in (printed := capsys.readouterr().out) and "9 rows" in printed
    experiment, measured = sweep(tmp_path, ("a", "b", "c"))
    assert command(experiment, ["--scale=exact"]) == 0
    assert measured == []
    assert experiment.state() == "exact done, paper not run at this scale"


def test_rows_and_page(tmp_path):
    experiment, _ = sweep(tmp_path, ("a", "bb"))
    command(experiment, [])
    rows = experiment.rows()
    assert rows.find("bb", "letters") == "2" and rows.number("bb", "letters") == 2.0
    assert rows.find("bb", "word") == "out of memory"
    assert math.isnan(rows.number("bb", "word")) and math.isnan(rows.number("cc", "letters"))
    assert rows.find("bb", "letters", TPU_ESTIMATE) == ""
    row = rows[0]
    assert (row.scale, row.item, row.quantity, row.value) == (EXACT, "a", "letters", "1")
    assert (row.seed, row.device, row.versions) == ("7", "cpu", f"numpy {np.__version__}")
    page = (tmp_path / "README.md").read_text()
    assert "| a | 1 | 0.333333 |\n| bb | 2 | 0.333333 |\n<!-- /names -->\nend" in page


def test_other_scales_take_the_exact_rows_with_them(tmp_path):
    experiment, measured = sweep(tmp_path, ("a", "z"))
    assert command(experiment, ["--scale=proxy"]) == 0
    assert measured == ["a", "z"]
    with pytest.raises(SystemExit):
        command(experiment, ["--scale=cpu"])  # It has no such rows.


def test_the_full_size_is_a_list_of_commands(tmp_path, capsys):
    experiment, measured = sweep(tmp_path)
    assert command(experiment, ["--scale=paper"]) == 0
    printed = capsys.readouterr().out
    assert "all: python -m effnetv2_jax.main --config=configs/s.py" in printed
    assert "107,338 steps" in printed and "243 px" in printed
    assert measured == [] and not experiment.results.exists()


def test_mistaken_files_are_one_sentence(tmp_path):
    experiment, _ = sweep(tmp_path)
    experiment.results.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has other columns than these experiments write"):
        experiment.rows()
    with pytest.raises(InputError, match="has no marks <!-- other --> and <!-- /other -->"):
        write_tables(tmp_path / "README.md", {"other": "| |"})
    assert read_rows(tmp_path / "none.csv") == ()


@pytest.mark.parametrize("arguments", [(), ("table03_fused", "--scale=paper")])
def test_the_commands_run(arguments):
    module = ".".join(("experiments", *arguments[:1]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "table03_fused" in done.stdout and "not run" in done.stdout


# --------------------------------------------------------------------------- estimates and ranks


def test_what_was_compiled_is_found_and_not_compiled_again(monkeypatch):
    monkeypatch.setattr(estimates.subprocess, "run", lambda *a, **k: pytest.fail("it compiles"))
    run = estimates.Run("configs/s.py")
    rows = run.rows()
    assert [(r.step, r.image_size, r.batch_per_core) for r in rows] == [
        *(("train", size, 128) for size in (128, 185, 243, 300)),
        ("eval", 384, 32),
    ]
    assert sum(row.steps for row in rows[:4]) == plan_of(run.load()).total_steps
    # 50,000 and 25,000 images in batches of 1,024, of weights and average, every 10 of 350 epochs.
    assert rows[-1].steps == 2 * (49 + 25) * 34
    assert run.hours() == pytest.approx(3.0, abs=0.05)
    quantities = estimates.step_quantities(estimates.train_step("configs/s.py", 300, 32))
    assert quantities["ms"] == pytest.approx(56.7, abs=0.1)
    assert quantities["images/s/core"] == pytest.approx(32 / 0.0567, rel=1e-2)


def test_what_was_not_compiled_is_asked_for_and_its_failure_told(monkeypatch, tmp_path):
    commands = []

    def fail(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(estimates.subprocess, "run", fail)
    monkeypatch.setattr(estimates, "RESULTS", tmp_path / "none.csv")
    run = estimates.train_step("configs/v1.py:b6", 512, 128)
    assert run.known_rows() is None and math.isnan(run.hours())
    with pytest.raises(InputError, match=r"tpu_compile.* ended with status 1 and without a row"):
        run.rows()
    assert "--config.batch_size=4096" in commands[0] and "--steps=train" in commands[0]
    assert "--config.progressive.image_size=(512, 512)" in commands[0]


def test_rank_correlation():
    assert rank.correlation([1, 2, 3, 4], [10, 20, 30, 31]) == pytest.approx(1.0)
    assert rank.correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # By hand: ranks 0, 1, 2, 3 and 1, 0, 2, 3: 1 - 6 * 2 / (4 * 15).
    assert rank.correlation([1, 2, 3, 4], [5, 4, 6, 7]) == pytest.approx(0.8)
    # Equal values share a rank; what is not known does not count.
    assert rank.correlation([1, 1, 2, math.nan], [1, 1, 2, 0]) == pytest.approx(1.0)
    assert math.isnan(rank.correlation([1, 2], [1, 2]))


def test_networks_are_trained_again_as_they_were_in_the_search():
    from effnetv2_jax.nas.trial import trial_config

    nas = importlib.import_module("experiments.nas.__main__")
    variant = nas.baseline()
    arm = nas._as_in_the_search(variant)
    again = estimates.Run(arm.config, dict(arm.overrides)).load()
    assert again.to_dict() == trial_config(nas._config().trial, variant).to_dict()


def test_the_searchs_networks_are_distinct_and_their_rewards_follow_from_their_row():
    nas = importlib.import_module("experiments.nas.__main__")
    known = {row["variant"]: row for row in nas.trials()}
    assert len(known) == len(nas.trials()) == nas._config().num_trials
    page = nas.tables(nas.EXPERIMENT.rows())["full"].splitlines()
    cells = {
        name: row for name, *row in ([c.strip() for c in line.split("|")[1:-1]] for line in page)
    }
    column = cells["network"].index("reward in the search")
    for name, variant in nas.chosen().items():
        # The baseline's ratios are 1, so that its reward is its accuracy.
        reward = (
            float(known[variant]["reward"])
            if variant in known
            else float(cells[name][cells["network"].index("accuracy in the search, %")]) / 100
        )
        assert float(cells[name][column]) == pytest.approx(reward, abs=6e-5), name


def test_what_fused_layers_cost_is_found_whatever_else_the_networks_chose():
    nas = importlib.import_module("experiments.nas.__main__")
    networks = [specs.get_spec(row["variant"]).rows for row in nas.trials()]
    factors = (0.7, 0.9, 1.0, 1.0, 1.2, 1.5)

    def cost(rows):
        effect = math.prod(
            f for f, row in zip(factors, rows, strict=True) if row.operation == "fused"
        )
        return effect * math.prod(row.expansion**0.3 * 1.2**row.repeats for row in rows)

    exact = np.array([cost(rows) for rows in networks])
    found = nas._effects(exact)
    assert [e.percent for e in found] == pytest.approx([100 * (f - 1) for f in factors], abs=1e-6)
    assert max(e.half_width for e in found) < 1e-6
    # With noise the intervals are to cover 95 %: of 1,200, within four standard deviations.
    rng = np.random.default_rng(0)
    covered = [
        abs(effect.percent - 100 * (factor - 1)) <= effect.half_width
        for _ in range(200)
        for effect, factor in zip(
            nas._effects(exact * np.exp(0.1 * rng.standard_normal(len(exact)))),
            factors,
            strict=True,
        )
    ]
    assert 0.925 < np.mean(covered) < 0.975


def test_a_difference_is_seen_if_its_interval_leaves_out_zero():
    # scipy.stats.ttest_ind(equal_var=False): 1.547 to 2.453, and -0.562 to 4.162.
    one, other = Spread((81.0, 81.2, 81.4)), Spread((79.0, 79.2, 79.4))
    assert one.minus(other) == "+2.00 ± 0.45 (seen)"
    wide = Spread((80.0, 81.0, 82.0))
    assert wide.minus(other) == "+1.80 ± 2.36 (not seen)"
    assert Spread((1.0,)).minus(other) == ""
    assert (str(Spread((1.0,))), str(one), str(Spread(()))) == (
        "1.00 (one seed)",
        "81.20 ± 0.20",
        "",
    )
