"""Documented commands that are too long, too privileged or too far away to be run here, and who runs them instead.

Their arguments are read all the same, by the program that they are for. A key stands for all commands that begin with
it; the longest that fits counts.
"""

from __future__ import annotations

TRAINING = "takes a Ray, and minutes: tests/workers/test_launch.py trains on one"
ON_A_CLUSTER = "takes a job on a Ray cluster: tests/workers/test_going_on.py asks one"
MEASURES = "minutes to hours of measuring: `python -m benchmarks` runs them all"

ELSEWHERE = {
    "decentral train": TRAINING,
    "decentral train --resume": "takes a run's checkpoints: tests/checkpoint/test_resume.py",
    "decentral status --address": ON_A_CLUSTER,
    "decentral watch --address": ON_A_CLUSTER,
    "decentral coordinate": "serves until all have left: tests/embedded/test_page.py runs the block",
    "decentral doctor": "seconds of looking at the whole machine: tests/doctor/test_checks.py",
    "decentral plan": "takes a fleet: tests/plan/test_plan_command.py plans for one",
    "decentral profile --listen": "waits for another machine: tests/test_profile.py measures a link",
    "decentral profile run.toml --peer": "takes another machine: tests/test_profile.py measures a link",
    "decentral --install-completion": "changes the user's shell: tests/docs/test_completion.py asks for completions",
    "python -m benchmarks.": MEASURES,
    "python -m soak.": "an hour each: tests/soak/test_soak.py runs a minute's worth",
    "python -m fuzz": "minutes: tests/test_fuzz.py runs some thousands of frames",
    "python -m examples.papers": "an hour: tests/test_paper_claims.py runs each claim small",
    "python -m examples.spot_weekend": "an hour: tests/test_examples.py runs it small",
    "python -m examples.stage_loss": "an hour: tests/test_examples.py runs it small",
    "python -m examples.hf_llm": "takes a trained model: tests/test_hf_llm.py trains one",
    "python -m pip wheel": "builds what tests/test_deploy.py installs from a wheel of its own",
    "DECENTRAL_WORKER=": "two processes side by side: tests/embedded/test_page.py runs the block as it stands",
    "make train": TRAINING,
    "make test": "the suite that this test is in",
    "make slow": "the longest tests of the suite, which CI runs",
    "make docs": "tests/docs/test_site.py builds the same",
    "make lint": "what CI runs beside the suite",
    "make fidelity": "root, minutes",
    "make chaos": "root, hours",
    "make fuzz": "minutes: tests/test_fuzz.py runs some thousands of frames",
    "pytest ": "files of the suite that this test is in",
    "pip install ": "takes the network; what is named are extras of pyproject.toml",
}
