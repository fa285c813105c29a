"""Tasks of the lm-evaluation-harness (pip install lm_eval), with average loops beside the scores.

    python -m lab.harness out/rpt --tasks gsm8k,arc_challenge --exit-threshold 0.5

Text is generated with exits that stop; a score of given text is read at each token's exit, after all loops.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import tyro
from tokenizers import Tokenizer

import data
import sample
from model import LoopedTransformer, chunked
from sample import END_THINK, THINK, Exit, GenerationFlags, generate, logits_at_exit
from support import checkpoint, runtime, text
from support.ranges import Positive, Range, unchecked
from support.runtime import UserError, console

# What a task may ask for besides `until` and `do_sample`; the last ones change nothing at these values
ASKED = {key: Range(1) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")}
ASKED |= {"temperature": Range(0), "top_p": Range(0, 1), "top_k": Range(-1, 0)}
ASKED |= {key: Range(0, 0) for key in ("min_p", "frequency_penalty", "presence_penalty")}
ASKED |= {key: Range(1, 1) for key in ("typical_p", "num_beams", "repetition_penalty", "length_penalty")}
SHIELD = "\ufdd0"  # around text that spells a token and must not become it; Unicode has no such character


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(GenerationFlags):
    tasks: str  # names, with commas between them: gsm8k,arc_challenge
    include_path: Path | None = None  # folder of task files of one's own
    num_fewshot: Annotated[int | None, Range(0)] = None  # solved examples before each question (none: the task's)
    limit: Annotated[int | None, Range(1)] = None  # only so many questions of each task
    batch: Positive = 16  # rows side by side
    max_tokens: Annotated[int | None, Range(1)] = None  # most new tokens of an answer (none: the task's, or 256)
    out: Path | None = None  # where to write scores and loops as JSON


def final_answer(said: str, opened: bool) -> str:
    """What of an answer is scored: what follows its last thought; nothing if a thought has no end."""
    _, closed, rest = said.rpartition(END_THINK)
    return rest.lstrip() if closed else "" if opened or said.lstrip().startswith(THINK) else said


def harness_model(net: LoopedTransformer, tokenizer: Tokenizer, exit: Exit, config: HarnessConfig):
    """The model as the harness asks for it (lm_eval.api.model.TemplateLM), counting the loops of each task's tokens."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs

    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    control = re.compile(f"({'|'.join(map(re.escape, sorted(added & text.CONTROL)))})")
    stops, device, most = sample.stop_ids(net, tokenizer), net.embed_tokens.weight.device, net.config.max_positions

    def score_at_exit(hidden: torch.Tensor, gate: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probability, whether it is the likeliest, loops.    N L D, N L, N -> N, N, N"""
        logits, loops = logits_at_exit(net, sample.Exit() if config.verify else exit, hidden, gate)  # N V, N
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].double(), logits.argmax(-1) == targets, loops

    class Looped(TemplateLM):
        eot_token_id = text.eos_id(tokenizer)
        tokenizer_name = str(config.folder)
        loops: ClassVar[dict[str, list[int]]] = {}  # of every token scored or generated, by task

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            parts = enumerate(string.split(SHIELD))  # every second one is shielded
            return [id for i, part in parts for id in text.tokenize(tokenizer, [part], special=i % 2 == 0)[0]]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            told = [f"{m['role']}\n{m['content'].replace(SHIELD, '')}" for m in chat_history]
            turns = [SHIELD.join(control.split(x) if x.startswith("assistant\n") else ("", x, "")) for x in told]
            turns += ["assistant\n" + f"{THINK}\n" * config.thinking] * add_generation_prompt
            return f"{text.IM_END}\n".join(f"{text.IM_START}{turn}" for turn in turns)

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name for request in requests]
            if config.thinking:
                raise UserError(f"--thinking: {self.asked[0]} scores given text, not an answer: leave one of both out")
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            raise UserError(f"{requests[0].task_name} asks for the perplexity of whole documents: leave the task out")

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
            given = [{key: x for key, x in request.args[1].items() if x is not None} for request in requests]
            for key, x in ((key, x) for how in given for key, x in how.items() if key not in ("until", "do_sample")):
                if key not in ASKED or type(x) not in (int, float) or not ASKED[key].holds(x):
                    raise UserError(f"a task asks for {key} {x}, which is not done here: leave the task out")
            asked = [normalize_gen_kwargs(how, 256) for how in given]
            limits = [config.max_tokens or how["max_gen_toks"] for how in asked]
            opened = [request.args[0].endswith(f"{THINK}\n") for request in requests]
            whole = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            prompts = [ids[-max(1, most - limit) :] for ids, limit in zip(whole, limits, strict=True)]
            if cut := sum(len(p) < len(w) for p, w in zip(prompts, whole, strict=True)):
                console.print(f"{cut} of {len(prompts)} prompts lose their start: {most} positions hold no more")
            bar = iter(runtime.progress_bar(range(len(prompts)), "generating"))  # a step for each answer
            answers = [""] * len(prompts)
            groups = Collator(range(len(prompts)), lambda i: -len(prompts[i]), asked.__getitem__, "gen_kwargs")
            for group in groups.get_batched(n=0):  # what may be generated side by side
                how, limit, ids = asked[group[0]], limits[group[0]], [[] for _ in group]
                until, seeds = [*filter(None, map(str, how["until"]))], [f"{config.seed}/{i}" for i in group]

                def done(row: int, tokens: list[int], group=group, until=until, limit=limit) -> bool:
                    recent = tokens[-8 - 4 * max(map(len, until), default=0) :]  # may hold the end of a stop text
                    said = tokenizer.decode(recent, skip_special_tokens=False)
                    if any(stop in said for stop in until):  # one in a thought ends nothing
                        said = final_answer(tokenizer.decode(tokens, skip_special_tokens=False), opened[group[row]])
                    if ended := tokens[-1] in stops or any(stop in said for stop in until) or len(tokens) == limit:
                        next(bar, None)
                    return ended

                flags = {x: getattr(config, x) for x in ("loops", "cache", "verify", "batch")} | {"max_tokens": limit}
                greedy, top_p = not how["do_sample"] or how.get("top_p") == 0, how.get("top_p") or 1.0
                flags |= {"temperature": 0.0 if greedy else how.get("temperature", 1.0), "top_p": top_p}
                for token in generate(net, [prompts[i] for i in group], exit=exit, done=done, seeds=seeds, **flags):
                    ids[token.row].append(token.id)
                    self.loops.setdefault(requests[group[token.row]].task_name, []).append(token.loops)
                for i, tokens in zip(group, ids, strict=True):
                    answer = final_answer(sample.decode_text(tokenizer, tokens), opened[i])
                    answers[i] = min((answer.partition(stop)[0] for stop in until), key=len, default=answer)
            return answers

    return Looped()


def main() -> None:
    with unchecked():
        config = tyro.cli(HarnessConfig, description=__doc__, prog="python -m lab.harness")
    config.check()
    runtime.require_new(config.out)
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    net, tokenizer, exit = sample.load_for(config)
    if text.eos_id(tokenizer) is None:
        raise UserError(f"{config.folder} was not trained on text: its tokenizer has no end of text, give another")
    sample.encode_prompts(tokenizer, [""], config)  # refuses chats where the tokenizer lacks their tokens
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    manager = lm_eval.tasks.TaskManager(include_path=config.include_path and str(config.include_path))
    wrong, names = [name for name in names if not manager.match_tasks([name])], manager.match_tasks(names)
    if wrong or not names:
        raise UserError(f"--tasks {config.tasks}: no task is called {', '.join(wrong) or 'that'}; see lm-eval ls tasks")
    lm = harness_model(net, tokenizer, exit, config)
    how = {"num_fewshot": config.num_fewshot, "limit": config.limit, "apply_chat_template": config.chat}
    how["system_instruction"] = config.system
    try:
        results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **how)
    except OSError as error:  # the base of what the datasets package raises
        raise UserError(f"--tasks {config.tasks}: a task's data can't be had ({error})") from error
    for task, metrics in results["results"].items():
        if loops := lm.loops.get(task):
            metrics |= {"loops": sum(loops) / len(loops), "tokens": len(loops)}
    rule = f"{exit.rule}:{exit.threshold:g}"
    print(f"{config.folder}, exit {rule}", lm_eval.utils.make_table(results), sep="\n")
    if config.out:
        result = {"harness": results["results"], "exit": rule, "cache": config.cache, "verify": config.verify}
        result["seed"] = config.seed
        checkpoint.write_json(config.out, result | runtime.provenance(net.embed_tokens.weight.device))


if __name__ == "__main__":
    runtime.run_cli(main)
