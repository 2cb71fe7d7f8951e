"""The workflows: they call targets that exist, ask for no more rights than they use, and publish what was tested."""

import re

import pytest
import yaml

from sources import ROOT

FOLDER = ROOT / ".github/workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
SCRIPTS = {"make", "pip", "pytest"}


def load(name: str) -> dict:
    workflow = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    workflow["on"] = workflow.pop(True)  # YAML reads the word as a truth
    return workflow


def steps(name: str) -> list[dict]:
    return [step for job in load(name)["jobs"].values() for step in job.get("steps", ())]


def test_there_are_workflows():
    assert {"ci.yml", "book.yml", "publish.yml", "notebooks.yml"} <= set(NAMES)
    assert {"html", "test", "test-site"} <= TARGETS


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_exists(name):
    runs = [step["run"] for step in steps(name) if "run" in step]
    called = [target for run in runs for target in re.findall(r"\bmake\s+([\w-]+)", run)]
    assert not set(called) - TARGETS
    assert {run.split()[0] for run in runs} <= SCRIPTS, "what is more than a call belongs into the Makefile"


@pytest.mark.parametrize("name", NAMES)
def test_jobs_end_and_have_no_more_rights_than_they_need(name):
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    for title, job in workflow["jobs"].items():
        assert ("uses" in job) != ("timeout-minutes" in job), title
        rights = job.get("permissions", {})
        assert not rights or {step["uses"].split("@")[0] for step in job["steps"]} == {"actions/deploy-pages"}, title


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_official_and_of_a_named_version(name):
    for job in load(name)["jobs"].values():
        if "uses" in job:
            called = load(job["uses"].removeprefix("./.github/workflows/"))
            known = called["on"]["workflow_call"]["inputs"]
            assert set(job.get("with", {})) <= set(known)
    for step in steps(name):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/none@v0"))


def test_only_what_was_tested_is_published():
    runs = [step.get("run", step.get("uses", "")).split("@")[0] for step in steps("book.yml")]
    order = ["make test", "make html", "make test-site", "actions/upload-pages-artifact"]
    assert [run for run in runs if run in order] == order
    publish = load("publish.yml")
    assert publish["on"]["push"] == {"branches": ["main"]}
    assert publish["jobs"]["deploy"]["needs"] == "book"
    assert publish["jobs"]["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert publish["concurrency"] == {"group": "pages", "cancel-in-progress": False}


def test_the_ci_script_calls_the_same_targets():
    called = re.findall(r"\bmake ([\w-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert set(called) <= TARGETS
    assert {"test", "html", "test-site"} <= set(called)


def test_a_machine_of_one_s_own_is_used_by_hand_only_and_the_notebooks_run_each_week():
    publish, notebooks = load("publish.yml"), load("notebooks.yml")
    assert publish["jobs"]["book"]["with"]["runner"] == "${{ inputs.runner || 'ubuntu-latest' }}"
    assert "paper" in publish["on"]["workflow_dispatch"]["inputs"]["scale"]["options"]
    assert "with" not in load("ci.yml")["jobs"]["book"]
    assert notebooks["on"]["schedule"]
    assert [step["run"] for step in steps("notebooks.yml") if "run" in step] == ["make test-notebooks"]
