"""Tasks of the lm-evaluation-harness (pip install lm_eval), with average loops beside the scores.

    python -m lab.harness out/rpt --tasks gsm8k,arc_challenge --exit-threshold 0.5

Text is generated with exits that stop; a score of given text is read at each token's exit, after all loops.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

import data
from model import LoopedTransformer, chunked
from sample import Exit, GenerationFlags, generate, load_with_tokenizer, logits_at_exit, stop_ids
from support import checkpoint, runtime, text
from support.ranges import Positive, Range, require_ranges
from support.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(GenerationFlags):
    tasks: str  # names, with commas between them: gsm8k,arc_challenge
    include_path: Path | None = None  # folder of task files of one's own
    num_fewshot: Annotated[int | None, Range(0)] = None  # solved examples before each question (none: the task's)
    limit: Annotated[int | None, Range(1)] = None  # only so many questions of each task
    chat: bool = False  # prompts as ChatML
    batch: Positive = 16  # rows side by side
    max_tokens: Positive = 256  # most new tokens of an answer, where the task sets none
    out: Path | None = None  # where to write scores and loops as JSON

    def check(self) -> None:
        """Raise UserError for a value outside its range, and for paths that can't be."""
        require_ranges(self)
        runtime.require_new(self.out)
        if self.include_path and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path} is not a folder: give one that holds task files")


def harness_model(net: LoopedTransformer, tokenizer: Tokenizer, exit: Exit, config: HarnessConfig):
    """The model as the harness asks for it (lm_eval.api.model.TemplateLM), counting the loops of each task's tokens."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    stops, device, most = stop_ids(net, tokenizer), net.embed_tokens.weight.device, net.config.max_positions

    def score_at_exit(hidden: Tensor, gate: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, whether it is the likeliest, loops.    N L D, N L, N -> N, N, N"""
        logits, loops = logits_at_exit(net, exit, hidden, gate)  # N V, N
        logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return logp.double(), logits.argmax(-1) == targets, loops

    class Looped(TemplateLM):
        eot_token_id = text.eos_id(tokenizer)
        tokenizer_name = str(config.folder)

        def __init__(self):
            super().__init__()
            self.loops: dict[str, list[int]] = {}  # of every token scored or generated, by task

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return text.tokenize(tokenizer, [string], special=True)[0]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = "".join(f"{text.IM_START}{m['role']}\n{m['content']}{text.IM_END}\n" for m in chat_history)
            if add_generation_prompt:
                return f"{turns}{text.IM_START}assistant\n"
            return turns.removesuffix(f"{text.IM_END}\n")  # the last turn goes on

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "ChatML" if chat_template else ""

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            owners, windows = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, most, 1):
                    owners.append(i)
                    windows.append((None, *make_disjoint_window(window)))
            self.asked = [requests[i].task_name for i in owners]
            totals = [0.0] * len(requests)
            for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += logp
            return totals

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether it is greedy's; a long context loses its start."""
            rows = [(context + new)[-most - 1 :] for _, context, new in requests]
            asked = [min(len(new), most) for _, _, new in requests]  # tokens
            order, scores = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [(0.0, True)] * len(rows)
            for start in runtime.progress_bar(range(0, len(rows), config.batch), "scoring"):
                chosen = order[start : start + config.batch]
                batch = data.collate([data.Row(rows[i], len(rows[i]) - asked[i]) for i in chosen])
                inputs, targets, mask = (part.to(device) for part in batch)  # B T
                parts = [part[mask] for part in (*net(inputs, loops=config.loops), targets)]  # N L D, N L, N
                loop_logits = net.config.vocab_size * parts[1].shape[-1]
                columns = chunked(score_at_exit, *parts, logits_per_token=loop_logits)
                by_row = [column.cpu().split([asked[i] for i in chosen]) for column in columns]
                for i, logp, greedy, loops in zip(chosen, *by_row, strict=True):
                    scores[i] = logp.sum().item(), bool(greedy.all())
                    self.loops.setdefault(self.asked[i], []).extend(loops.tolist())
            return scores

        def generate_until(self, requests, **_) -> list[str]:
            asked = [normalize_gen_kwargs(request.args[1], config.max_tokens) for request in requests]
            for how in asked:
                if how.get("top_k"):
                    raise UserError(f"a task asks for top_k {how['top_k']}, which is unknown here: leave the task out")
                if how["do_sample"] and not how.get("temperature"):
                    how["temperature"] = 1.0
            prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            room = [max(1, most - how["max_gen_toks"]) for how in asked]
            if cut := sum(len(p) > n for p, n in zip(prompts, room, strict=True)):
                note = f"{cut} of {len(prompts)} prompts lose their start: {most} positions hold no more"
                runtime.console.print(note)
            prompts = [p[-n:] for p, n in zip(prompts, room, strict=True)]
            bar = iter(runtime.progress_bar(range(len(prompts)), "generating"))  # a step for each answer

            answers = [""] * len(prompts)
            for how in {repr(how): how for how in asked}.values():
                # What may be generated side by side, longest prompt first
                group = sorted((i for i, other in enumerate(asked) if other == how), key=lambda i: -len(prompts[i]))
                until, ids = [stop for stop in how["until"] if stop], [[] for _ in group]
                tail = 8 + 4 * max(map(len, until), default=0)  # tokens that may hold the end of a stop text

                def done(row: int, tokens: list[int], until=until, tail=tail, limit=how["max_gen_toks"]) -> bool:
                    end = tokenizer.decode(tokens[-tail:], skip_special_tokens=False)
                    ended = tokens[-1] in stops or any(stop in end for stop in until) or len(tokens) == limit
                    if ended:
                        next(bar, None)
                    return ended

                flags = {"exit": exit, "loops": config.loops, "cache": config.cache, "batch": config.batch}
                flags |= {"temperature": how.get("temperature") or 0.0, "top_p": how.get("top_p") or 1.0}
                flags |= {"max_tokens": how["max_gen_toks"], "seeds": [f"{config.seed}/{i}" for i in group]}
                for token in generate(net, [prompts[i] for i in group], done=done, **flags):
                    ids[token.row].append(token.id)
                    self.loops.setdefault(requests[group[token.row]].task_name, []).append(token.loops)
                for i, tokens in zip(group, ids, strict=True):
                    answer = tokenizer.decode(tokens, skip_special_tokens=True)
                    answers[i] = min((answer.partition(stop)[0] for stop in until), key=len, default=answer)
            return answers

    return Looped()


def main() -> None:
    config = tyro.cli(HarnessConfig, description=__doc__, prog="python -m lab.harness")
    config.check()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    net, tokenizer = load_with_tokenizer(config.folder, runtime.pick_device(config.device), config.dtype)
    if text.eos_id(tokenizer) is None:
        raise UserError(f"{config.folder} was not trained on text: its tokenizer has no end of text, give another")
    if config.chat:
        text.chat_prompts(tokenizer, [""])  # refuses a tokenizer without its tokens
    exit = config.exit_rule(net.config.exit_threshold)
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=config.include_path and str(config.include_path))
    unknown, names = [name for name in names if not manager.match_tasks([name])], manager.match_tasks(names)
    if unknown or not names:
        problem = f"--tasks {config.tasks}: no task is called {', '.join(unknown) or 'that'}"
        raise UserError(f"{problem}; see lm-eval ls tasks")
    lm = harness_model(net, tokenizer, exit, config)
    how = {"num_fewshot": config.num_fewshot, "limit": config.limit, "apply_chat_template": config.chat}
    try:
        results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **how)["results"]
    except OSError as error:  # the base of what the datasets package raises
        raise UserError(f"--tasks {config.tasks}: a task's data can't be had ({error})") from error
    scores, rows, rule = {}, [], f"{exit.rule}:{exit.threshold:g}"
    for task, metrics in results.items():
        loops = lm.loops.get(task, [])
        mean = sum(loops) / len(loops) if loops else None
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        scores[task] = numbers | {"loops": mean, "tokens": len(loops)}
        for name, value in numbers.items():
            metric, _, filtered = name.partition(",")
            if not metric.endswith("_stderr") and "," in name:
                spread = numbers.get(f"{metric}_stderr,{filtered}")
                score = f"{value:.4f}" if spread is None else f"{value:.4f} ± {spread:.4f}"
                what = metric if filtered == "none" else f"{metric} ({filtered})"
                rows.append((f"{task}: {what}", score, "–" if mean is None else f"{mean:.2f}"))
    runtime.print_table(f"{config.folder}, exit {rule}", ("task", "score", "loops"), rows)
    if config.out:
        result = {"harness": scores, "exit": rule, "cache": config.cache, "seed": config.seed}
        checkpoint.write_json(config.out, result | runtime.provenance(net.embed_tokens.weight.device))


if __name__ == "__main__":
    runtime.run_cli(main)
