"""Tasks of the lm-evaluation-harness (pip install lm_eval), with average loops beside the scores.

    python -m lab.harness out/rpt --tasks gsm8k,arc_challenge --exit-threshold 0.5

Text is generated with exits that stop; a score of given text is read at each token's exit, after all loops.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from tokenizers import Tokenizer

import data
from model import LoopedTransformer, chunked
from sample import Exit, GenerationFlags, generate, load_with_tokenizer, logits_at_exit, stop_ids
from support import checkpoint, runtime, text
from support.ranges import Positive, Range, require_ranges
from support.runtime import UserError, console


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

    def score_at_exit(hidden: torch.Tensor, gate: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probability, whether it is the likeliest, loops.    N L D, N L, N -> N, N, N"""
        logits, loops = logits_at_exit(net, exit, hidden, gate)  # N V, N
        logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return logp.double(), logits.argmax(-1) == targets, loops

    class Looped(TemplateLM):
        eot_token_id = text.eos_id(tokenizer)
        tokenizer_name = str(config.folder)
        loops: ClassVar[dict[str, list[int]]] = {}  # of every token scored or generated, by task

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return text.tokenize(tokenizer, [string], special=True)[0]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = "".join(f"{text.IM_START}{m['role']}\n{m['content']}{text.IM_END}\n" for m in chat_history)
            unfinished = turns.removesuffix(f"{text.IM_END}\n")  # the last turn goes on
            return f"{turns}{text.IM_START}assistant\n" if add_generation_prompt else unfinished

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "ChatML" if chat_template else ""

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            pieces = []  # number of the request, context, continuation
            for i, request in enumerate(requests):
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, most, 1)
                pieces += [(i, *make_disjoint_window(window)) for window in windows]
            self.asked, totals = [requests[i].task_name for i, _, _ in pieces], [0.0] * len(requests)
            for (i, _, _), (logp, _) in zip(pieces, self._loglikelihood_tokens(pieces), strict=True):
                totals[i] += logp
            return totals

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether it is greedy's; a long context loses its start."""
            cut = [(context + new)[-most - 1 :] for _, context, new in requests]
            rows = [data.Row(ids, max(1, len(ids) - len(new))) for ids, (_, _, new) in zip(cut, requests, strict=True)]
            order, scores = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)), [(0.0, True)] * len(rows)
            for start in runtime.progress_bar(range(0, len(rows), config.batch), "scoring"):
                chosen = order[start : start + config.batch]
                inputs, targets, mask = (part.to(device) for part in data.collate([rows[i] for i in chosen]))  # B T
                parts = [part[mask] for part in (*net(inputs, loops=config.loops), targets)]  # N L D, N L, N
                columns = chunked(score_at_exit, *parts, logits_per_token=parts[1].shape[-1] * net.config.vocab_size)
                by_row = [column.cpu().split(mask.sum(1).tolist()) for column in columns]
                for i, logp, greedy, loops in zip(chosen, *by_row, strict=True):
                    scores[i] = logp.sum().item(), bool(greedy.all())
                    self.loops.setdefault(self.asked[i], []).extend(loops.tolist())
            return scores

        def generate_until(self, requests, **_) -> list[str]:
            asked = [normalize_gen_kwargs(request.args[1], config.max_tokens) for request in requests]
            groups: dict[str, list[int]] = {}  # what may be generated side by side
            for i, how in enumerate(asked):
                groups.setdefault(repr(how), []).append(i)
                if how.get("top_k"):
                    raise UserError(f"a task asks for top_k {how['top_k']}, which is unknown here: leave the task out")
            whole = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            prompts = [ids[-max(1, most - how["max_gen_toks"]) :] for ids, how in zip(whole, asked, strict=True)]
            if cut := sum(len(p) < len(w) for p, w in zip(prompts, whole, strict=True)):
                console.print(f"{cut} of {len(prompts)} prompts lose their start: {most} positions hold no more")
            bar = iter(runtime.progress_bar(range(len(prompts)), "generating"))  # a step for each answer
            answers = [""] * len(prompts)
            for group in groups.values():
                group.sort(key=lambda i: -len(prompts[i]))
                how, ids = asked[group[0]], [[] for _ in group]
                until, limit = [stop for stop in how["until"] if stop], how["max_gen_toks"]
                tail = 8 + 4 * max(map(len, until), default=0)  # tokens that may hold the end of a stop text

                def done(row: int, tokens: list[int], until=until, tail=tail, limit=limit) -> bool:
                    end = tokenizer.decode(tokens[-tail:], skip_special_tokens=False)
                    if ended := tokens[-1] in stops or any(stop in end for stop in until) or len(tokens) == limit:
                        next(bar, None)
                    return ended

                flags = {"exit": exit, "loops": config.loops, "cache": config.cache, "batch": config.batch}
                flags |= {"max_tokens": limit, "temperature": how.get("temperature") or float(how["do_sample"])}
                flags |= {"top_p": how.get("top_p") or 1.0, "seeds": [f"{config.seed}/{i}" for i in group]}
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
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    net, tokenizer = load_with_tokenizer(config.folder, runtime.pick_device(config.device), config.dtype)
    if text.eos_id(tokenizer) is None:
        raise UserError(f"{config.folder} was not trained on text: its tokenizer has no end of text, give another")
    if config.chat:
        text.chat_prompts(tokenizer, [""])  # refuses a tokenizer without its tokens
    exit = config.exit_rule(net.config.exit_threshold)
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    manager = lm_eval.tasks.TaskManager(include_path=config.include_path and str(config.include_path))
    wrong, names = [name for name in names if not manager.match_tasks([name])], manager.match_tasks(names)
    if wrong or not names:
        raise UserError(f"--tasks {config.tasks}: no task is called {', '.join(wrong) or 'that'}; see lm-eval ls tasks")
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
        for metric, filtered in (name.split(",", 1) for name in numbers if "," in name and "_stderr," not in name):
            value, error = numbers[f"{metric},{filtered}"], numbers.get(f"{metric}_stderr,{filtered}")
            score = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
            what = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append((f"{task}: {what}", score, "–" if mean is None else f"{mean:.2f}"))
    runtime.print_table(f"{config.folder}, exit {rule}", ("task", "score", "loops"), rows)
    if config.out:
        result = {"harness": scores, "exit": rule, "cache": config.cache, "seed": config.seed}
        checkpoint.write_json(config.out, result | runtime.provenance(net.embed_tokens.weight.device))


if __name__ == "__main__":
    runtime.run_cli(main)
