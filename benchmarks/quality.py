"""The quality ladder: what fusion gains over its pivot, beside label-only training and both published recipes.

    python benchmarks/quality.py --quick                                 under 15 minutes on 2 cores
    python benchmarks/quality.py [--regimes small-12] [--rungs labels joint] [--seeds 3]
    python benchmarks/quality.py --recorded --plot docs/quality.png      what was measured before; trains nothing

Every rung of a regime begins at the same pivot and sees the same samples for the same number of steps, each at the
learning rate that does best at the first seed on one half of the held-out pieces; what is reported is the other half.
Every run's figures go to --record with the config that made them, but for --quick's, and a run found there is not made
again; what is trained is kept under --work, so that a run that was cut off goes on. The figures of the rungs asked for
go to --json, one table of all regimes to --markdown, their picture to --plot.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import common
import ladder_besides
import ladder_picture
import ladder_record
import ladder_show
from ladder import DOMAINS, DTYPE, LEAST, QUICK, QUICK_RATE, RATES, REGIMES, RUNGS, TRIAL, Regime, Rung, Zoo
from ladder_climb import Climber
from ladder_lab import QUESTIONS, Lab
from ladder_record import Record, Row
from ladder_trials import TRIALS

from fusion import cluster, tracking
from fusion.release import tasks

ALL_REGIMES = {**REGIMES, TRIAL.name: TRIAL, LEAST.name: LEAST}
ALL_RUNGS = {**RUNGS, **TRIALS}
PICTURES = (".png", ".svg", ".pdf")


def main() -> None:
    """Climb."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny corpus, one rate, one seed: whether it works")
    parser.add_argument(
        "--regimes",
        nargs="+",
        metavar="REGIME",
        choices=list(ALL_REGIMES),
        default=list(REGIMES),
        help=f"of these; and {TRIAL.name}, where settings are tried, and {LEAST.name}, with less text still",
    )
    parser.add_argument(
        "--rungs",
        nargs="+",
        metavar="RUNG",
        choices=list(ALL_RUNGS),
        default=list(RUNGS),
        help=f"of these, and single changes to joint: {', '.join(TRIALS)}",
    )
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates it may take")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=0, help="of GSM8K that every model is asked")
    parser.add_argument(
        "--zoo", type=Path, default=common.SHARED / "zoo", help="pivot-…, math-…, code-…, prose-…, and the texts"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=DTYPE, help="that all models compute in")
    parser.add_argument("--work", type=Path, help="folder that keeps what is trained; default: build/quality[-ZOO]")
    parser.add_argument("--record", type=Path, default=ladder_record.HERE, help="figures of all runs, added to")
    parser.add_argument("--recorded", action="store_true", help="train nothing, show what --record has")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to a file")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write one table of all regimes to a file")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the ladder into a picture")
    given = common.parsed(parser)
    zoo = Zoo.of(given.zoo.resolve(), given.dtype)
    if given.work is None:
        other = zoo.folder != parser.get_default("zoo").resolve()
        given.work = Path(f"build/quality-{zoo.folder.name}" if other else "build/quality")
    if given.quick and given.recorded:
        raise ValueError("--quick shows that training works: not with --recorded")
    if given.recorded and not given.record.is_file():
        raise ValueError(f"--record {given.record}: there is no such file")
    for name in ("record", "markdown", "plot"):
        path = getattr(given, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.resolve().parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"--{name} {path}: is a folder; name a file")
    if given.plot is not None and given.plot.suffix not in PICTURES:
        raise ValueError(f"--plot {given.plot}: must end in {', '.join(PICTURES)}")
    for rate in given.rates:
        if not 0 < rate < 1:
            raise ValueError(f"--rates {rate:g}: must be above 0 and below 1")
    if given.questions < 0:
        raise ValueError(f"--questions {given.questions}: must be at least 0")
    if given.questions and not given.recorded:
        tasks.manager([str(QUESTIONS)])  # refused now, and not after hours, where lm-evaluation-harness is missing
    if given.seeds < 1:
        raise ValueError(f"--seeds {given.seeds}: must be at least 1")
    regimes = [QUICK] if given.quick else [ALL_REGIMES[name] for name in given.regimes]
    rates, seeds = ([QUICK_RATE], 1) if given.quick else (given.rates, given.seeds)
    if given.quick:
        given.rungs = [name for name in given.rungs if _quick(ALL_RUNGS[name])]
    _climb_all(given, zoo, regimes, rates, seeds)


def _quick(rung: Rung) -> bool:
    """Whether there is time for a rung in quick mode."""
    return rung.times in (1, 10) and len(rung.sources) == len(DOMAINS)


def _climb_all(
    given: argparse.Namespace, zoo: Zoo, regimes: Sequence[Regime], rates: Sequence[float], seeds: int
) -> None:
    _quieten()
    given.work.mkdir(parents=True, exist_ok=True)
    known = None if given.quick else given.record
    record = Record(known, zoo, given.work / "fingerprints.json")
    if given.recorded:
        _show(given, regimes, rates, seeds, Climber(zoo, record, None))
        return
    cluster.start()
    try:
        begun = time.monotonic()
        lab = Lab(given.work.resolve(), zoo, given.quick, given.questions)
        _show(given, regimes, rates, seeds, Climber(zoo, record, lab))
        tracking.say(f"{time.monotonic() - begun:.0f} s in all")
    finally:
        cluster.stop()


def _show(
    given: argparse.Namespace, regimes: Sequence[Regime], rates: Sequence[float], seeds: int, climber: Climber
) -> None:
    lab, rows = climber.lab, list[Row]()
    asked = [ALL_RUNGS[name] for name in given.rungs]
    rungs = {r.name: [rung for rung in asked if lab is None or lab.feeds(rung, r)] for r in regimes}
    shown = []
    for regime in regimes:
        untrained, climbed = climber.untrained(regime), list[Row]()
        for rung in rungs[regime.name]:
            climbed += climber.climb(regime, rung, rates, seeds)
            common.write(given.json, [*rows, *untrained, *climbed])
        if not climbed or all(row["rung"] != "pivot" for row in untrained):
            continue  # with --recorded alone
        shown.append(regime)
        rows += [*untrained, *climbed]
        ladder_show.table(regime, rows)
    if not shown:
        raise ValueError(f"--record {given.record}: has nothing of {', '.join(r.name for r in regimes)}")
    tables = ladder_besides.besides(shown, rows)
    for table in tables:
        common.show(*table)
    ladders = [regime for regime in shown if regime.name in REGIMES] or shown  # where settings are tried has no column
    if given.markdown:
        given.markdown.write_text(ladder_show.overview(ladders, rows, tables))
        print(f"table in {given.markdown}")
    if given.plot:
        ladder_picture.picture(given.plot, ladders, rows)


def _quieten() -> None:
    """Leave the terminal to the ladder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    common.door(main)
