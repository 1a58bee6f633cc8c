"""Wrong versions of the code, each of which some test must reject.

A mutant is the smallest edit that gives a wrong definition while everything still runs and all paths still agree with
each other: what only a test against the meaning can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which occurs `count` times in `file`, by `new`."""

    file: str
    old: str
    new: str
    count: int = 1

    def apply(self, root: Path) -> None:
        """Change the file under `root`. Raises ValueError: the text to replace is not there as often as expected."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != self.count:
            raise ValueError(
                f"{self.file}: found {self.old!r} {found} times, expected {self.count}. Update the mutant."
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Mutant:
    """A named set of edits and the tests (paths or node ids) of which at least one must fail."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def _mutant(name: str, tests: str, *edits: Edit) -> Mutant:
    return Mutant(name, edits, tuple(tests.split()))


_BMOJO = "bmojo/mixers/bmojo.py"
_MAMBA2 = "bmojo/mixers/mamba2.py"
_REFERENCE = "tests/bmojo/test_reference.py"

MUTANTS: tuple[Mutant, ...] = (
    # Training on GPUs
    _mutant("gradients of a graph are its memory, not copies", "tests/bmojo/test_graphs.py",
            Edit("bmojo/graphs.py", "found = iter(copies)", "found = iter(there)")),
    _mutant("the loss of a graph is its memory, not a copy", "tests/bmojo/test_graphs.py",
            Edit("bmojo/graphs.py", "return replay.loss.clone()", "return replay.loss")),
    _mutant("casts of weights are kept from one use to the next", "tests/bmojo/test_graphs.py",
            Edit("bmojo/graphs.py", "torch.set_autocast_cache_enabled(False)", "pass")),
    _mutant("only the first tile of a rotary table is written", "tests/kernels/pointwise/test_triton.py",
            Edit("kernels/pointwise/triton_plan.py", "(triton.cdiv(num_rows, rows),),",
                 "(1, triton.cdiv(num_rows, rows)),")),
    _mutant("joined gradients are read beyond a part's end", "tests/kernels/pointwise/test_triton.py",
            Edit("kernels/pointwise/triton_elements.py", " & (column < end)\n", "\n")),
    _mutant("the sum's own gradient is left out of its norm's", "tests/kernels/pointwise/test_triton.py",
            Edit("kernels/pointwise/triton_rows.py",
                 "        if base_ptr is not None:\n            grad_value +=",
                 "        if base_ptr is not None:\n            grad_value += 0 *")),
    _mutant("rows filled up for cuBLAS bring other columns", "tests/kernels/linear/test_triton.py",
            Edit("kernels/linear/triton_path.py", "grad_weight[: sum(ctx.widths)]", "grad_weight[-sum(ctx.widths) :]")),
    # The model
    _mutant("eidetic keys seen at distance W + 1", _REFERENCE,
            Edit(_BMOJO, "config.window_size)  # slots are seen", "config.window_size + 1)  # slots are seen"),
            Edit(_BMOJO, "rotary.at(window_size)", "rotary.at(window_size + 1)")),
    _mutant("dt bias with the wrong sign", _REFERENCE,
            Edit(_MAMBA2, "dt.to(precise) + self.dt_bias", "dt.to(precise) - self.dt_bias"),
            Edit("kernels/ssd_scan/reference.py", " + bias_h)", " - bias_h)")),
    _mutant("D term dropped", _REFERENCE,
            Edit(_MAMBA2, "B_btgn, C_btgn, self.D, initial", "B_btgn, C_btgn, self.D * 0, initial"),
            Edit(_MAMBA2, "B_bgn, C_bgn, self.D, state", "B_bgn, C_bgn, self.D * 0, state")),
    _mutant("residual projections without 1 / sqrt(2 L)", _REFERENCE,
            Edit("bmojo/fields.py", "self.init_std / math.sqrt(2 * self.num_layers)", "self.init_std")),
    _mutant("random selection with a constant rank", _REFERENCE,
            Edit("bmojo/mixers/innovation.py", "return ((mixed ^ (mixed >> 13)) & 0xFFFFFF)",
                 "return ((mixed ^ mixed) & 0xFFFFFF)")),
    _mutant("separate fading projections ignored", _REFERENCE,
            Edit(_BMOJO, ", self.fading_kv_proj)", ")"),
            Edit(_BMOJO, "(self.fading_kv_proj or projections.kv_proj)", "projections.kv_proj")),
    _mutant("queries times 1.1", _REFERENCE,
            Edit("bmojo/mixers/attention.py", "q = projected", "q = 1.1 * projected"),
            Edit("bmojo/mixers/attention.py", "else self.q_norm(q)", "else 1.1 * self.q_norm(q)")),
    _mutant("gate after the norm", _REFERENCE,
            Edit(_MAMBA2, "self.norm(y, gate=z)", "self.norm(y) * F.silu(z)")),
    _mutant("fading keys without RoPE", _REFERENCE,
            Edit(_BMOJO, "readable.rotary, self.fading_kv_proj)",
                 "readable.rotary, self.fading_kv_proj)\n        fading = fading._replace(k=_)"),
            Edit("kernels/memory_write/torch_path.py", "rotate(fading[0], *near)", "fading[0]")),
    _mutant("predictor weights reversed", _REFERENCE,
            Edit("bmojo/mixers/innovation.py", "for j in range(1, self.taps + 1)", "for j in range(self.taps, 0, -1)")),
    _mutant("score eps 1e-2", _REFERENCE, Edit("kernels/innovation_select/reference.py", "EPS = 1e-6", "EPS = 1e-2")),
    _mutant("tau doubled", _REFERENCE,
            Edit("bmojo/fields.py", "    @cached_property\n    def mixers(",
                 "    def __getattribute__(self, name):\n        value = super().__getattribute__(name)\n"
                 "        return 2 * value if name == 'innovation_tau' and value else value\n\n"
                 "    @cached_property\n    def mixers(")),
    _mutant("RoPE exponent doubled", _REFERENCE,
            Edit("kernels/pointwise/reference.py", "theta ** (-channel / head_dim)",
                 "theta ** (-2 * channel / head_dim)")),
    _mutant("a token more than all rows wanted", "tests/bmojo/test_decoder.py",
            Edit("bmojo/generation.py", "if ended is not None and ended.value():", "if False:")),
    _mutant("a state that fits is taken, but not copied", "tests/bmojo/test_decoder.py",
            Edit("bmojo/decoding.py", "self.state.copy_(state)", "self.state = state")),
    # Serving
    _mutant("rows are not rounded to whole vectors", "tests/pipelines/serving/test_batch.py",
            Edit("pipelines/serving/batch.py", "return math.ceil(num_rows / multiple) * multiple", "return num_rows")),
    _mutant("idle rows move on", "tests/pipelines/serving/test_batch.py",
            Edit("pipelines/serving/batch.py", "position_b.mul_(in_use_b)", "position_b.mul_(1)")),
    _mutant("a prompt is read whole, and others wait", "tests/pipelines/serving/test_engine.py",
            Edit("pipelines/serving/engine.py", "            self._meter.read(reading.advance())",
                 "            while not reading.is_done:\n                self._meter.read(reading.advance())")),
    _mutant("a fork continues the state it was forked from", "tests/pipelines/serving/test_engine.py",
            Edit("pipelines/serving/context.py", "context.state.clone() if tokens", "context.state if tokens")),
    _mutant("another model's state is taken", "tests/pipelines/serving/test_states.py",
            Edit("pipelines/serving/states.py", "if facts.model_digest != self._digest:", "if False:")),
    _mutant("what may begin a stop is shown", "tests/pipelines/serving/test_text.py",
            Edit("pipelines/serving/text.py", "len(self._held) - self._num_begun()", "len(self._held)")),
    _mutant("any host's name is answered", "tests/pipelines/serving/test_app.py",
            Edit("pipelines/serving/guard.py", "if name not in self._hosts:", "if False:")),
    # Data
    _mutant("samples that do not overlap: their last token is no target", "tests/data/test_packing.py",
            Edit("data/packers.py", "min(start + seq_len + 1, len(tokens))", "min(start + seq_len, len(tokens))")),
    _mutant("targets are the inputs themselves", "tests/data/test_packing.py tests/data/test_streaming.py",
            Edit("data/shards.py", "targets_bt[row, :num_inputs] = tokens[1:]",
                 "targets_bt[row, :num_inputs] = tokens[:-1]")),
    _mutant("documents begin one token late", "tests/data/test_packing.py tests/data/test_streaming.py",
            Edit("data/shards.py", "np.cumsum(starts_t[:num_inputs]", "np.cumsum(np.roll(starts_t, 1)[:num_inputs]")),
    _mutant("the end of a document counts as bytes of text", "tests/data/test_tokenizer.py",
            Edit("data/tokenizer.py", 'b"" if token["special"] else token["content"].encode()',
                 'token["content"].encode()')),
    _mutant("one order for all epochs", "tests/data/test_order.py",
            Edit("data/order.py", "(self._seed, _SAMPLES, *block)",
                 "(self._seed, _SAMPLES, block.path, 0, block.number)"),
            Edit("data/order.py", "(self._seed, _SHARDS, epoch)", "(self._seed, _SHARDS)")),
    _mutant("a mixture whose sources take turns", "tests/data/test_mixture.py",
            Edit("data/mixture.py", "heapq.heappush(ready, (math.ceil(job / shares[source]), source, job))",
                 "heapq.heappush(ready, (job, source, job))")),
    _mutant("a curriculum that forgets what was read before", "tests/data/test_mixture.py",
            Edit("data/mixture.py", "slots.counts(inside) + self._before[number]", "slots.counts(inside)")),
    _mutant("shards are not compared when they arrive",
            "tests/data/test_shard_cache.py tests/pipelines/stages/tokenize/test_reading.py",
            Edit("data/shard_cache.py", "if found != entry.sha256:", "if False:")),
    _mutant("shards that are arriving take no room", "tests/data/test_shard_cache.py",
            Edit("data/shard_cache.py", "os.truncate(file.fileno(), num_bytes)", "pass")),
    _mutant("every worker reads the same part of a batch", "tests/data/test_streaming.py",
            Edit("data/streaming.py", "by_path[self.worker.rank * share : (self.worker.rank + 1) * share]",
                 "by_path[:share]")),
    _mutant("the loss counts all tokens of a task", "tests/data/test_token_sources.py",
            Edit("data/shards.py", '[sample["loss_mask"][1:] == 0]', '[sample["loss_mask"][1:] == 2]')),
    _mutant("a document of ids begins in two slices", "tests/data/test_token_sources.py",
            Edit("data/sources/tokens.py", "            if begun >= end:\n                return\n", "")),
    _mutant("the last of equal documents stays", "tests/data/test_filters.py",
            Edit("data/filters/duplicates.py", "order = np.lexsort((number, key))",
                 "order = np.lexsort((-number, key))")),
    _mutant("documents with a key in common belong together", "tests/data/test_filters.py",
            Edit("data/filters/duplicates.py", "others = others[np.concatenate(is_same)]",
                 "others = others[np.concatenate(is_same) | True]")),
    _mutant("bytes behind a URL are read from the start", "tests/data/test_remote_sources.py",
            Edit("data/sources/remote.py", "cat_file(key, start=self._position, end=end)",
                 "cat_file(key, start=0, end=end - self._position)")),
    # Pipelines
    _mutant("losses by source of the wrong sequences", "tests/pipelines/stages/train/test_mixture.py",
            Edit("pipelines/stages/train/sources.py", "stream.places(step)", "stream.places(step + 1)")),
    _mutant("a step that is not finite is applied", "tests/pipelines/stages/train/test_trainer.py",
            Edit("pipelines/stages/train/backends/deepspeed.py", "(~torch.isfinite(norm)).float()",
                 "torch.zeros_like(norm)")),
    _mutant("steps that were left out count as taken", "tests/pipelines/stages/train/test_loop.py",
            Edit("pipelines/stages/train/loop.py", "optimizer_steps=self.step - len(self.skipped)",
                 "optimizer_steps=self.step")),
    _mutant("only the last of several steps is looked at", "tests/pipelines/stages/train/test_loop.py",
            Edit("pipelines/stages/train/loop.py", "if math.isfinite(norm):",
                 "if step != self.step or math.isfinite(norm):")),
    _mutant("gzip holds a GPU", "tests/pipelines/stages/evaluate/test_evaluation.py",
            Edit("pipelines/stages/evaluate/measures/text.py", "resources.without_accelerators()", "resources")),
    _mutant("nats per byte instead of bits", "tests/pipelines/stages/evaluate/test_text.py",
            Edit("pipelines/stages/evaluate/measures/text_work.py", "Ratio(nll / math.log(2)", "Ratio(nll")),
    _mutant("a token counts for the document after its own", "tests/pipelines/stages/evaluate/test_text.py",
            Edit("pipelines/stages/evaluate/measures/text_work.py", "first_sample * seq_len + at_s",
                 "first_sample * seq_len + at_s + 1")),
    _mutant("packed documents of a long stretch see each other", "tests/pipelines/stages/evaluate/test_position.py",
            Edit("pipelines/stages/evaluate/measures/position_work.py", "if self.keeps_apart:", "if False:")),
    _mutant("a continuation is scored one token late", "tests/pipelines/stages/evaluate/test_continuations.py",
            Edit("pipelines/stages/evaluate/continuations.py",
                 "columns += range(len(row.ids) - len(row.targets), len(row.ids))",
                 "columns += range(len(row.ids) - len(row.targets) - 1, len(row.ids) - 1)")),
    _mutant("a text in words begins without the start of a document",
            "tests/pipelines/stages/evaluate/harness/test_native_against_hf.py",
            Edit("pipelines/stages/evaluate/harness/lm.py", "[*self._codec.start_ids, *ids]", "ids")),
    _mutant("among equal answers the right one wins", "tests/pipelines/stages/evaluate/measures/test_recall.py",
            Edit("pipelines/stages/evaluate/measures/recall_work.py", "1 / winners if", "1.0 if")),
    _mutant("recall asks with documents of the training", "tests/pipelines/stages/evaluate/measures/test_recall.py",
            Edit("pipelines/stages/evaluate/measures/recall_work.py", "(seed, number, _STREAM)", "(seed, number)")),
    _mutant("needles are asked for in the reverse order", "tests/data/test_text_tasks.py",
            Edit("data/tasks/text/needle.py", "reversed(needles)", "needles")),
    _mutant("the first place of a key is its source, not the last", "tests/data/test_tasks.py",
            Edit("data/tasks/mad.py", "value_at[key] = parts.answer(value, [value_at[key]]) if",
                 "value_at[key] = value_at[key] + 0 * parts.answer(value, [value_at[key]]) if")),
    _mutant("a model from elsewhere may change after the plan", "tests/pipelines/stages/evaluate/test_external.py",
            Edit("pipelines/stages/evaluate/external.py", "if identity_of(files_of(folder)) != version:",
                 "if not version:")),
    _mutant("weights that are missing are random", "tests/pipelines/stages/evaluate/test_external.py",
            Edit("pipelines/stages/evaluate/external_model.py", "    if missing:", "    if not found:")),
    _mutant("a damaged result of a task counts", "tests/pipelines/stages/evaluate/test_kept.py",
            Edit("pipelines/stages/evaluate/kept.py", "if digest != _digest(arrays):", "if not digest:")),
    _mutant("intervals as of many equal documents", "tests/pipelines/stages/test_uncertainty.py",
            Edit("pipelines/stages/uncertainty.py", "max(t, min(quantile, _MOST_T * t))", "_NORMAL")),
    _mutant("a difference is as unsure as two models that have nothing in common",
            "tests/pipelines/stages/test_uncertainty.py",
            Edit("pipelines/stages/uncertainty.py", "((0, 1.0), (2, -1.0))", "((0, 1.0), (2, 1.0))")),
    _mutant("warm-up from a learning rate of zero", "tests/pipelines/stages/train/test_schedule.py",
            Edit("pipelines/stages/train/config.py", "self.lr * step / self.warmup_steps",
                 "self.lr * (step - 1) / self.warmup_steps")),
    _mutant("checkpoints kept for good count among the newest", "tests/pipelines/stages/train/test_checkpoint.py",
            Edit("pipelines/stages/train/checkpoint.py", "stays |= {", "stays &= {")),
    _mutant("a gathering copy reads copies that contradict it", "tests/pipelines/foreach/test_expansion.py",
            Edit("pipelines/foreach/expansion.py", "other for other in copies[need.stage] if other.agrees(copy.values)",
                 "other for other in copies[need.stage] if need.gathered is not None or other.agrees(copy.values)")),
    _mutant("a preset in foreach drops the changes beside it", "tests/pipelines/foreach/test_values.py",
            Edit("pipelines/foreach/values.py", "return {**below, **above} if _merge(below, above) else value",
                 "return {**below, **above} if _merge(own, value) else value")),
    _mutant("a deeper field of foreach is overwritten", "tests/pipelines/foreach/test_files.py",
            Edit("pipelines/foreach/expansion.py", "key=lambda field: len(field.parts))",
                 "key=lambda field: -len(field.parts))")),
    _mutant("a python stage is blind to what its module imports", "tests/pipelines/stages/python/test_sources.py",
            Edit("pipelines/stages/python/sources.py", "            waiting += _imports(", "            _imports(")),
    _mutant("a changed module of a python stage is not imported again", "tests/pipelines/stages/python/test_task.py",
            Edit("pipelines/stages/python/task.py", "                del sys.modules[name]", "                pass")),
    _mutant("the names that a python stage gives its inputs do not count", "tests/pipelines/engine/test_graph.py",
            Edit("pipelines/engine/plan.py", 'return f"named {role.name}"', 'return "named"')),
    _mutant("a successor does not seal its predecessor's log", "tests/pipelines/engine/test_event_log.py",
            Edit("pipelines/engine/event_log.py", "        self._seal_predecessors()\n", "")),
    _mutant("owners are sealed from the newest on", "tests/pipelines/engine/test_event_log.py",
            Edit("pipelines/engine/event_log.py", "for owner in reversed(unsealed)", "for owner in unsealed[:1]")),
    _mutant("an append that was cut off counts as a lost log", "tests/pipelines/engine/test_event_log.py",
            Edit("pipelines/engine/event_log.py", "if isinstance(self._read_or_none(place), Sealed | None):",
                 "if True:")),
    _mutant("progress does not give a stage its retries back", "tests/pipelines/engine/test_policy.py",
            Edit("pipelines/engine/policy.py", "tally = Tally(mark=mark)", "tally = replace(tally, mark=mark)")),
    _mutant("lost processes use up the retries of errors", "tests/pipelines/engine/test_policy.py",
            Edit("pipelines/engine/policy.py", "Budget.LOST_RETRIES if failure.is_loss else Budget.RETRIES",
                 "Budget.RETRIES")),
    _mutant("room that others hold counts as free", "tests/pipelines/engine/test_placement.py",
            Edit("pipelines/engine/placement.py", "amount - bundle.get(name, 0.0)", "amount")),
    _mutant("attempts of earlier owners are forgotten", "tests/pipelines/engine/test_state.py",
            Edit("pipelines/engine/state.py", '"started_at", "attempts", "log"', '"started_at", "log"')),
    _mutant("stages with one result are made side by side", "tests/pipelines/engine/test_parallel_stages.py",
            Edit("pipelines/engine/scheduler.py", "if other.is_running and (other.planned.kind",
                 "if False and (other.planned.kind")),
    _mutant("a failed stage stops those that do not need it", "tests/pipelines/engine/test_parallel_stages.py",
            Edit("pipelines/engine/scheduler.py", 'if planned.config.on_failure == "stop" and', "if")),
    _mutant("what a killed attempt forked lives on", "tests/pipelines/engine/test_stage_processes.py",
            Edit("pipelines/engine/processes.py", "os.killpg(self.pid, signal.SIGKILL)", "pass")),
    _mutant("secrets inside lists are shown", "tests/pipelines/test_redact.py",
            Edit("pipelines/redact.py", "return [_redact(item, secrets) for item in value]",
                 "return list(value)")),
    _mutant("one node that sees the storage is enough", "tests/pipelines/test_shared_storage.py",
            Edit("pipelines/shared_storage.py", "    if blind:\n", "    if len(blind) == len(nodes):\n")),
    _mutant("the same steps once more give a scheduler more restarts", "tests/pipelines/test_supervisor.py",
            Edit("pipelines/supervisor.py", "if step > self.farthest.get(stage, -1):", "if step >= 0:")),
    _mutant("a cancelled run is started again", "tests/pipelines/test_supervisor.py",
            Edit("pipelines/supervisor.py", "if code >= 0 and code != EXIT_RESUMABLE:", "if code in (0, 1, 70):")),
    _mutant("one request to end that comes twice keeps a stage from saving",
            "tests/pipelines/engine/test_stage_processes.py",
            Edit("pipelines/engine/stage_process.py", "return  # the same request", "pass  # the same request")),
    _mutant("everybody may read the variables of a job", "tests/pipelines/submit/test_package.py",
            Edit("pipelines/submit/package.py", "environment, 0o600)", "environment, 0o644)")),
    _mutant("a job's output is shown again after a lost connection", "tests/pipelines/submit/test_job.py",
            Edit("pipelines/submit/job.py", "write(text[written - seen :])", "write(text)")),
    _mutant("a fingerprint that is blind to the text", "tests/pipelines/engine/test_fingerprint.py",
            Edit("pipelines/engine/fingerprint.py", '"content": content,\n    }', '"content": None,\n    }')),
    _mutant("checkpoints are not compared with their digests",
            "tests/pipelines/stages/train/test_checkpoint.py",
            Edit("pipelines/stages/train/checkpoint.py", "_sha256(path) != expected.sha256", "not expected.sha256")),
    _mutant("models on other documents are compared", "tests/pipelines/stages/report/test_comparison.py",
            Edit("pipelines/stages/report/comparison.py", "if ours.identity != theirs.identity:", "if False:")),
    _mutant("a model is best if its value is", "tests/pipelines/stages/report/test_comparison.py",
            Edit("pipelines/stages/report/comparison.py", "if delta.low <= 0 <= delta.high:", "if False:")),
    _mutant("models of two learning rates are replicates", "tests/pipelines/stages/report/test_subjects.py",
            Edit("pipelines/stages/report/subjects.py",
                 "and _canonical(training.recipe) == _canonical(first.recipe)", "and True")),
    _mutant("intervals lose a digit", "tests/pipelines/stages/test_numbers.py",
            Edit("pipelines/stages/numbers.py", "decimals = _decimals_for(max(high - value, value - low), 2)",
                 "decimals = _decimals_for(max(high - value, value - low), 1)")),
    _mutant("a table is listed again with each delivery", "tests/pipelines/tracking/test_replay.py",
            Edit("pipelines/tracking/mlflow/sink.py", "if one != entry]", "if True]")),
    _mutant("a resumed stage tells its steps again", "tests/pipelines/tracking/test_journal.py",
            Edit("pipelines/tracking/journal.py", "if not self._is_told(name, step)", "if True")),
)  # fmt: skip
