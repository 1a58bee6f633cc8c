from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.errors import ConfigError
from pipelines.storage import open_storage
from pipelines.tracking import replay as replay_module
from pipelines.tracking.journal import Journal
from pipelines.tracking.mlflow.target import MlflowConfig, MlflowTarget
from pipelines.tracking.replay import RUN_JOURNAL, Delivery, Replay, Replayer, deliver_all
from pipelines.tracking.run_tracking import RunTracking, TrackingOptions, check_target, sync
from pipelines.tracking.trouble import Cause, brief
from tests.pipelines.tracking.mlflow_server import Server, client
from tests.pipelines.waiting import wait_until


def history(target: MlflowTarget, mlflow_run: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client(target).get_metric_history(mlflow_run, name))


def write_run(run_dir: Path, artifact: Path, steps: range = range(5), status: str | None = "SUCCEEDED") -> None:
    """The journals of a pipeline run with one stage, `train`."""
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "plots").mkdir(exist_ok=True)
    (artifact / "plots/loss.txt").write_text("down")
    with Journal(run_dir / f"journal/{RUN_JOURNAL}.jsonl") as journal:
        journal.write("start", tags={"bmojo.pipeline": "p"}, artifact_url=None)
    with Journal(run_dir / "journal/train.jsonl") as journal:
        journal.write("start", tags={"bmojo.fingerprint": "f" * 64}, artifact_url=str(artifact))
        journal.log_params({"lr": 0.1, "long": "x" * 9000, "workers": 1} | {f"p{n}": n for n in range(150)})
        journal.log_json("config.json", {"lr": 0.1})
        journal.log_dataset("corpus", "d" * 64, str(artifact))
        journal.log_artifact("plots/loss.txt")
        journal.log_artifact("plots")
    with Journal(run_dir / "journal/train.workers.jsonl") as journal:
        for step in steps:
            journal.log_metrics(
                step, {"train/loss": 1.0 / (step + 1), "train/lr": 0.1}, time_ms=1_700_000_000_000 + step
            )
    if status:
        with Journal(run_dir / "journal/train.jsonl") as journal:
            journal.write("end", status=status, tags={"bmojo.duration_s": "1.5"})


def test_a_run_is_shown_with_all_that_belongs_to_it(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    replay = Replay(tmp_path / "run/journal", target, "whole-1")
    assert replay.pending() == 13
    deliver_all(replay)
    assert replay.pending() == 0
    assert replay.refused == []
    parent, child = replay.runs[RUN_JOURNAL], replay.runs["train"]
    run = client(target).get_run(child)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["bmojo.fingerprint"] == "f" * 64
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 153
    assert len(run.data.params["long"]) == 6000
    assert history(target, child, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(5)]
    assert client(target).get_metric_history(child, "train/lr")[0].timestamp == 1_700_000_000_000
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("corpus", "d" * 36)
    assert [item.path for item in client(target).list_artifacts(child, "plots")] == ["plots/loss.txt"]
    assert {item.path for item in client(target).list_artifacts(child)} == {"config.json", "plots"}
    assert client(target).get_run(parent).info.status == "RUNNING"


def test_a_table_is_logged_as_mlflow_does_and_delivered_again_has_no_row_twice(
    tmp_path: Path, target: MlflowTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", target.uri)  # load_table asks it for the runs
    with Journal(tmp_path / "run/journal/report.jsonl") as journal:
        journal.write("start", tags={}, artifact_url=str(tmp_path))
        journal.log_table("results.json", ["model", "loss"], [["a", 3.0], ["b", None], ["c", float("inf")]])
        journal.log_table("other.json", ["n"], [[1]])
    for _ in range(2):
        replay = Replay(tmp_path / "run/journal", target, "table-1")
        deliver_all(replay)
        assert replay.refused == []
        (tmp_path / "run" / f"delivered-{target.key}.json").unlink()
    run = replay.runs["report"]
    experiment = client(target).get_run(run).info.experiment_id
    table = client(target).load_table(experiment, "results.json", [run])
    assert table["model"].tolist() == ["a", "b", "c"]
    listed = client(target).get_run(run).data.tags["mlflow.loggedArtifacts"]
    assert listed == '[{"path": "results.json", "type": "table"}, {"path": "other.json", "type": "table"}]'
    assert table["loss"].tolist() == pytest.approx([3.0, float("nan"), float("inf")], nan_ok=True)


def test_replaying_everything_again_changes_nothing(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    first = Replay(tmp_path / "run/journal", target, "again-1")
    deliver_all(first)
    for cursor in (tmp_path / "run").glob("delivered-*.json"):
        cursor.unlink()
    second = Replay(tmp_path / "run/journal", target, "again-1")
    assert second.pending() == 13
    deliver_all(second)
    assert second.runs == first.runs
    child = second.runs["train"]
    assert len(history(target, child, "train/loss")) == 5
    assert len(client(target).get_run(child).inputs.dataset_inputs) == 1


def test_a_crash_between_delivery_and_cursor_repeats_nothing(
    tmp_path: Path, target: MlflowTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    for crash_at in range(1, 6):  # each save of the cursor in turn fails, as if the process had died before it
        saves = 0

        def dying(self: Replay, save=Replay._save_cursor, crash_at: int = crash_at) -> None:
            nonlocal saves
            saves += 1
            if saves == crash_at:
                raise InterruptedError
            save(self)

        with monkeypatch.context() as patch:
            patch.setattr(Replay, "_save_cursor", dying)
            try:
                deliver_all(Replay(tmp_path / "run/journal", target, "crash-1"))
            except InterruptedError:
                continue
    replay = Replay(tmp_path / "run/journal", target, "crash-1")
    deliver_all(replay)
    assert len(history(target, replay.runs["train"], "train/loss")) == 5
    experiment = client(target).get_experiment_by_name("experiment").experiment_id
    found = client(target).search_runs([experiment], "tags.`bmojo.run_id` = 'crash-1'")
    assert len(found) == 2


def test_a_sync_beside_a_live_run_makes_no_second_run(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    both = [Replay(tmp_path / "run/journal", target, "both-1") for _ in range(2)]
    threads = [threading.Thread(target=deliver_all, args=(replay,)) for replay in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [replay.pending() for replay in both] == [0, 0]
    assert both[0].runs == both[1].runs
    experiment = client(target).get_experiment_by_name("experiment").experiment_id
    assert len(client(target).search_runs([experiment], "tags.`bmojo.run_id` = 'both-1'")) == 2
    assert len(history(target, both[0].runs["train"], "train/loss")) == 5


def test_a_resumed_stage_stays_one_child_and_keeps_its_first_params(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact", range(3), status="RESUMABLE")
    deliver_all(Replay(tmp_path / "run/journal", target, "resume-1"))
    write_run(tmp_path / "run", tmp_path / "artifact", range(1, 6), status=None)
    with Journal(tmp_path / "run/journal/train.jsonl") as journal:
        journal.log_params({"workers": 2})
    replay = Replay(tmp_path / "run/journal", target, "resume-1")
    deliver_all(replay)
    run = client(target).get_run(replay.runs["train"])
    assert run.info.status == "RUNNING"
    assert run.data.params["workers"] == "1"
    assert [step for step, _ in history(target, run.info.run_id, "train/loss")] == list(range(6))


def test_a_tag_has_the_latest_text_and_a_long_one_is_cut(tmp_path: Path, target: MlflowTarget) -> None:
    run_dir, long = tmp_path / "run", "torch: " + "why " * 5000
    for owner, path in (1, "cpp"), (2, "triton"):
        with Journal(run_dir / f"journal/train.{owner:06d}.workers.jsonl") as journal:
            journal.log_tags({f"bmojo.path.{number}": f"{path}: a reason" for number in range(150)})
            journal.log_tags({"bmojo.path.long": long})
        replay = Replay(run_dir / "journal", target, "tags-1")
        deliver_all(replay)
        assert replay.refused == []
        tags = client(target).get_run(replay.runs["train"]).data.tags
        assert [tags[f"bmojo.path.{number}"] for number in range(150)] == [f"{path}: a reason"] * 150
        assert tags["bmojo.path.long"] == long[:8000]


def test_a_run_deleted_in_mlflow_is_told_again(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    replay = Replay(tmp_path / "run/journal", target, "deleted-1")
    deliver_all(replay)
    old = replay.runs["train"]
    client(target).delete_run(old)
    with Journal(tmp_path / "run/journal/train.jsonl") as journal:
        journal.log_params({"new": "1"})
    replay = Replay(tmp_path / "run/journal", target, "deleted-1")
    deliver_all(replay)
    assert replay.runs["train"] != old
    assert len(history(target, replay.runs["train"], "train/loss")) == 5


def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(tmp_path: Path, target: MlflowTarget) -> None:
    with Journal(tmp_path / "run/journal/train.jsonl") as journal:
        journal.write("start", tags={}, artifact_url=str(tmp_path))
        journal.log_metrics(0, {"good": 1.0})
        journal.log_metrics(1, {"bad|name": 1.0})
        journal.log_metrics(2, {"good": 2.0})
        journal.log_artifact("was-deleted.txt")
        journal.write("end", status="FAILED", tags={})
    replay = Replay(tmp_path / "run/journal", target, "refused-1")
    deliver_all(replay)
    assert [text.split(":")[0] for text in replay.refused] == ["metrics", "artifact"]
    child = replay.runs["train"]
    assert history(target, child, "good") == [(0, 1.0), (2, 2.0)]
    assert client(target).get_run(child).info.status == "FAILED"


def test_a_model_is_registered_once(tmp_path: Path, target: MlflowTarget) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with Journal(tmp_path / "run/journal/export.jsonl") as journal:
        journal.write("start", tags={}, artifact_url=str(tmp_path))
        for _ in range(2):
            journal.log_model("tiny", "model", {"parameters": 5})
    deliver_all(Replay(tmp_path / "run/journal", target, "model-1"))
    (version,) = client(target).search_model_versions("name = 'tiny'")
    assert version.source.endswith("/model")


@pytest.mark.ci
def test_a_server_killed_while_training_logs_loses_and_doubles_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "_LAST_RETRY_S", 0.5)
    server.start()
    notices: list[str] = []
    live = MlflowTarget(server.uri, "live")
    options = TrackingOptions((live,), system_metrics=False, drain_s=60)
    storage = open_storage(tmp_path / "storage")
    tracking = RunTracking(storage, "runs/r-1", "r-1", options, notices.append)
    tracking.start({}, {"name": "p"}, all_reused=False)
    killed = restarted = False
    journal = tracking.open_stage("train")
    journal.write("start", tags={}, artifact_url=str(tmp_path))
    step = 0
    starter: threading.Thread | None = None
    while not restarted or step < 400:
        journal.log_metrics(step, {"train/loss": float(step)})
        step += 1
        time.sleep(0.005 if starter is None else 0.05)
        if step >= 200 and not killed and "train" in Replay(tracking.journal_dir, live, "r-1").runs:
            server.kill()
            killed = True
        if killed and starter is None and any("cannot be reached" in notice for notice in notices):
            starter = threading.Thread(target=server.start)
            starter.start()
        restarted = starter is not None and not starter.is_alive()
    journal.write("end", status="SUCCEEDED", tags={})
    journal.close()
    wait_until(lambda: any("answers again" in notice for notice in notices))
    assert tracking.stop("SUCCEEDED", {}) == ()
    replay = Replay(tracking.journal_dir, live, "r-1")
    child = replay.runs["train"]
    assert history(live, child, "train/loss") == [(n, float(n)) for n in range(step)]
    assert client(live).get_run(child).info.status == "FINISHED"


def test_with_no_server_at_all_the_end_is_quick_and_a_sync_delivers(
    tmp_path: Path, target: MlflowTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    gone = MlflowTarget("http://127.0.0.1:9", "gone")
    storage = open_storage(tmp_path / "storage")
    monkeypatch.setattr(replay_module, "_PATIENCE_S", 0.2)  # and not the hour that a slow server would have
    tracking = RunTracking(storage, "runs/r-2", "r-2", TrackingOptions((gone,), drain_s=3600), notices.append)
    tracking.start({}, {"name": "p"}, all_reused=False)
    with tracking.open_stage("train") as journal:
        journal.write("start", tags={}, artifact_url=str(tmp_path))
        journal.log_metrics(0, {"x": 1.0})
    wait_until(lambda: notices)
    (backlog,) = tracking.stop("SUCCEEDED", {})
    assert (backlog.sink, backlog.events) == ("MLflow", 5)
    assert backlog.trouble is not None
    assert backlog.trouble.cause is Cause.AWAY
    away = sync(storage, "runs/r-2", "r-2", gone)
    assert (away.delivered, away.remaining) == (0, 5)
    assert away.trouble is not None
    assert away.trouble.cause is Cause.AWAY
    assert sync(storage, "runs/r-2", "r-2", target) == Delivery(5, 0, (), None)
    assert sync(storage, "runs/r-2", "r-2", target) == Delivery(0, 0, (), None)
    replay = Replay(tracking.journal_dir, target, "r-2")
    assert history(target, replay.runs["train"], "x") == [(0, 1.0)]


def test_the_target_comes_from_config_then_environment_then_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert MlflowConfig(experiment="e").target(storage).uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert MlflowConfig(experiment="e").target(storage).uri == "http://from-environment"
    assert MlflowConfig(uri="http://u:p@host", experiment="e").target(storage).shown_uri == "http://***@host"
    assert MlflowConfig(uri="http://***@host", experiment="e").target(storage).uri == "http://host"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    elsewhere = MlflowConfig(experiment="e").target(open_storage("memory://x"))
    assert elsewhere.uri == f"sqlite:///{tmp_path}/.bmojo/mlflow/mlflow.db"
    assert elsewhere.notice is not None


def test_an_idle_replayer_does_not_import_mlflow(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from pipelines.tracking.replay import Replay, Replayer
from pipelines.tracking.mlflow.target import MlflowTarget
replayer = Replayer(Replay(Path({str(tmp_path)!r}) / "journal", MlflowTarget("http://x", "e"), "r"), print)
replayer.start()
print(replayer.drain(5), "mlflow" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "None False\n"


def test_a_deleted_experiment_is_refused_before_the_run_and_told_once_during_it(
    tmp_path: Path, target: MlflowTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(target, experiment="to be deleted")
    check_target(mine, "deleted-2")
    experiment = client(mine).get_experiment_by_name("to be deleted").experiment_id
    write_run(tmp_path / "run", tmp_path / "artifact", status=None)
    replay = Replay(tmp_path / "run/journal", mine, "deleted-2")
    deliver_all(replay)
    client(mine).delete_experiment(experiment)
    with pytest.raises(ConfigError, match=f"was deleted.*restore --experiment-id {experiment}.*tracking.experiment"):
        check_target(mine, "deleted-2")
    notices: list[str] = []
    refusals: list[Exception] = []

    def counted(deliver: Callable[[], bool] = replay.deliver) -> bool:
        try:
            return deliver()
        except Exception as error:
            refusals.append(error)
            raise

    monkeypatch.setattr(replay, "deliver", counted)
    monkeypatch.setattr(replay_module, "_LAST_RETRY_S", 0.05)
    replayer = Replayer(replay, notices.append)
    replayer.start()
    with Journal(tmp_path / "run/journal/train.workers.jsonl") as journal:
        for step in range(5, 12):
            journal.log_metrics(step, {"train/loss": 1.0})
            wait_until(lambda step=step: len(refusals) > step - 5)
    assert len(notices) == 1
    assert "was deleted there. Restore it" in notices[0]
    client(mine).restore_experiment(experiment)
    assert replayer.drain(60) is None or sync_until_done(tmp_path / "run/journal", mine)
    assert [step for step, _ in history(mine, replay.runs["train"], "train/loss")] == list(range(12))


def sync_until_done(journals: Path, target: MlflowTarget) -> bool:
    return deliver_all(Replay(journals, target, "deleted-2")).remaining == 0


@pytest.mark.parametrize("folder", ["100%25 done", "a?b#c d", "ü %20", "it's 50% & +1"])
def test_any_folder_can_be_the_storage(tmp_path: Path, folder: str, target: MlflowTarget) -> None:
    storage = open_storage(tmp_path / folder)
    mine = MlflowConfig(experiment="e").target(storage)
    assert mine.artifact_root is not None
    target.open("make-the-store")
    assert target.artifact_root is not None
    mine.artifact_root.mkdir(parents=True)
    (mine.artifact_root.parent / "mlflow.db").write_bytes((target.artifact_root.parent / "mlflow.db").read_bytes())
    tracking = RunTracking(storage, "runs/r-1", "r-1", TrackingOptions((mine,), system_metrics=False), [].append)
    tracking.start({}, {"name": "p"}, all_reused=False)
    (tmp_path / folder / "plot.txt").write_text("down")
    with tracking.open_stage("train") as journal:
        journal.write("start", tags={}, artifact_url=str(tmp_path / folder))
        journal.log_metrics(0, {"x": 1.0})
        journal.log_artifact("plot.txt")
    assert tracking.stop("SUCCEEDED", {}) == ()
    replay = Replay(tracking.journal_dir, mine, "r-1")
    child = replay.runs["train"]
    assert history(mine, child, "x") == [(0, 1.0)]
    assert [item.path for item in client(mine).list_artifacts(child)] == ["plot.txt"]
    assert list((mine.artifact_root / child).rglob("plot.txt")) or list(mine.artifact_root.rglob("plot.txt"))
    assert not [path for path in tmp_path.iterdir() if path.name != folder]


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("foo bar", "no store of this kind"),
        ("ftp://x", "no store of this kind"),
        ("./mlruns", "is a folder"),
        ("file:///tmp/x", "is a folder"),
        ("http://", "names no server"),
        ("http://a b/", "names no server"),
        ("http://h:99999", "names no server"),
    ],
)
def test_an_address_that_no_store_can_have_is_a_configuration_error(tmp_path: Path, uri: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"tracking.uri.*{problem}.*Expected"):
        MlflowConfig(uri=uri, experiment="e").target(open_storage(tmp_path))


def test_a_store_that_cannot_be_opened_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    def try_for_minutes(*_: object, **__: object) -> None:
        raise AssertionError("MLflow would try such a store for minutes")

    monkeypatch.setattr(mlflow, "MlflowClient", try_for_minutes)
    (tmp_path / "text.db").write_text("this is not a database, it is a text of some length" * 100)
    for uri in (f"sqlite:///{tmp_path}/no/such/folder.db", f"sqlite:///{tmp_path}/text.db"):
        with pytest.raises(ConfigError, match=r"cannot be opened.*another store"):
            check_target(MlflowTarget(uri, "e"), "r", patience_s=600)


def always(status: int) -> type[BaseHTTPRequestHandler]:
    """Answers everything with one status: a proxy, or a server that wants a password."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"no")

        do_POST = do_GET  # noqa: N815 (the name that http.server calls)

        def log_message(self, *arguments: object) -> None:
            pass

    return Answering


@pytest.mark.parametrize(("status", "refused"), [(401, True), (403, True), (404, True), (503, False)])
def test_what_a_server_answers_decides_whether_the_run_may_begin(status: int, refused: bool) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), always(status)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = MlflowTarget(f"http://127.0.0.1:{server.server_port}", "e")
        if refused:
            with pytest.raises(ConfigError, match="credentials" if status < 404 else "is no MLflow server"):
                check_target(target, "r")
        else:
            check_target(target, "r")
        server.shutdown()


def test_a_cursor_that_cannot_be_written_is_told_as_what_it_is(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    (tmp_path / "run" / f"delivered-{target.key}.json").mkdir()  # no file can be moved there
    replay = Replay(tmp_path / "run/journal", target, "cursor-1")
    delivery = deliver_all(replay)
    assert (delivery.delivered, delivery.remaining) == (13, 0)
    assert delivery.trouble is not None
    assert delivery.trouble.cause is Cause.DISK
    assert f"delivered-{target.key}.json cannot be written" in delivery.trouble.text


def test_a_damaged_line_is_left_out_and_the_rest_arrives(tmp_path: Path, target: MlflowTarget) -> None:
    write_run(tmp_path / "run", tmp_path / "artifact")
    path = tmp_path / "run/journal/train.workers.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 7'))
    replay = Replay(tmp_path / "run/journal", target, "damaged-1")
    delivery = deliver_all(replay)
    assert (delivery.delivered, delivery.remaining) == (13, 0)
    assert len(delivery.refused) == 1
    assert "is damaged just before byte" in delivery.refused[0]
    assert [step for step, _ in history(target, replay.runs["train"], "train/loss")] == [0, 1, 3, 4]


def test_errors_are_shortened_between_words() -> None:
    text = brief(ValueError("Max retries exceeded " * 40))
    assert text.endswith((" exceeded ...", " retries ...", " Max ..."))
