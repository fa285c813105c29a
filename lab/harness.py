"""The lm-evaluation-harness."""


@dataclass(frozen=True)
class HarnessConfig:
    """Run tasks of the lm-evaluation-harness (pip install lm_eval). Text is generated with exits that stop; a score of
    given text is read at each token's exit, after all loops. Average loops stand beside the scores."""

    folder: Annotated[Path, tyro.conf.Positional]  # checkpoint folder, of this program or of Hugging Face
    tasks: str  # names, with commas between them: gsm8k,arc_challenge
    include_path: Path | None = None  # folder of task files of one's own
    num_fewshot: int | None = None  # solved examples before each question (none: the task's)
    limit: int | None = None  # only so many questions of each task
    chat: bool = False  # prompts as ChatML
    exit_threshold: float | None = None  # leave when the gate's cumulative probability reaches it (none: checkpoint's)
    exit: str | None = None  # another rule: confidence:0.9 leaves when a token is that probable
    loops: int | None = None  # the most loops for a token (none: the checkpoint's)
    cache: CacheRule = "copy"  # as in sample.py
    batch: int = 16  # rows side by side
    max_tokens: int = 256  # most new tokens of an answer, where the task sets none
    seed: int = 0  # of the draws, where a task draws
    device: str = "auto"  # cpu, cuda, cuda:1 (auto: a GPU if there is one)
    dtype: Precision = "auto"  # of weights and cache (auto: as stored)
    out: Path | None = None  # where to write scores and loops as JSON

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot {self.num_fewshot} is below 0: give a number of examples")
        for name in ("batch", "max_tokens", "limit", "loops"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is below 1: give a positive number")
        if self.out and self.out.exists():
            raise UserError(f"--out {self.out} is there already: nothing saved is overwritten, give another name")
        if self.out:
            make_folder(self.out.parent)
        if self.include_path and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path} is not a folder: give one that holds task files")


def harness_model(net: LoopedTransformer, tokenizer: Tokenizer, exit: Exit, config: HarnessConfig):
    """The model as the harness asks for it (lm_eval.api.model.TemplateLM), counting the loops of each task's tokens."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    stops, device, most = sample.stop_ids(net, tokenizer), net.embed_tokens.weight.device, net.config.max_positions

    class Looped(TemplateLM):
        eot_token_id = data.eos_id(tokenizer)
        tokenizer_name = str(config.folder)

        def __init__(self):
            super().__init__()
            self.loops: dict[str, list[int]] = {}  # of every token scored or generated, by task

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return data.ids(tokenizer, [string], special=True)[0]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = [f"{data.IM_START}{m['role']}\n{m['content']}{data.IM_END}\n" for m in chat_history]
            if add_generation_prompt:
                return "".join(turns) + f"{data.IM_START}assistant\n"
            return "".join(turns).removesuffix(f"{data.IM_END}\n")  # the last turn goes on

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "ChatML" if chat_template else ""

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.asked = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            owners, windows = [], []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, most, 1):
                    owners.append(i)
                    windows.append((None, *make_disjoint_window(window)))
            self.asked = [requests[i].task_name for i in owners]
            totals = [0.0] * len(requests)
            for i, (logp, _) in zip(
                owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
            ):
                totals[i] += logp
            return totals

        @torch.no_grad()
        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
            """Log-probability of each continuation, and whether it is greedy's; a long context loses its start."""
            rows = [((context + new)[-most - 1 :], min(len(new), most)) for _, context, new in requests]
            order, found = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), [(0.0, True)] * len(rows)
            for start in track(range(0, len(rows), config.batch), "scoring", disable=disable_tqdm):
                chosen = order[start : start + config.batch]
                ids = torch.zeros(len(chosen), len(rows[chosen[0]][0]) - 1, dtype=torch.long)  # B T
                mask, targets = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
                for b, i in enumerate(chosen):
                    row, n = rows[i]
                    ids[b, : len(row) - 1], targets[b, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
                    mask[b, len(row) - 1 - n : len(row) - 1] = True
                out = net(ids.to(device), loops=config.loops)
                mask, targets = mask.to(device), targets.to(device)
                pieces = (part[mask].split(1024) for part in (out.hidden, out.gate, targets))
                scored = []  # N 3: log-probability, whether it is the likeliest, loops
                for hidden, gate, target in zip(*pieces, strict=True):
                    logits, loops = at_exit(net, exit, hidden, gate)  # N V, N
                    logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
                    scored.append(torch.stack((logp.double(), logits.argmax(-1) == target, loops), -1).cpu())
                for i, part in zip(chosen, torch.cat(scored).split([rows[i][1] for i in chosen]), strict=True):
                    found[i] = part[:, 0].sum().item(), bool(part[:, 1].all())
                    self.loops.setdefault(self.asked[i], []).extend(part[:, 2].long().tolist())
            return found

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            asked = [normalize_gen_kwargs(request.args[1], config.max_tokens) for request in requests]
            for how in asked:
                if how.get("top_k"):
                    raise UserError(
                        f"a task asks for top_k {how['top_k']}, which is not known here: leave the task out"
                    )
                if how["do_sample"] and not how.get("temperature"):
                    how["temperature"] = 1.0
            prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            room = [max(1, most - how["max_gen_toks"]) for how in asked]
            if cut := sum(len(p) > n for p, n in zip(prompts, room, strict=True)):
                console.print(f"{cut} of {len(prompts)} prompts lose their start: {most} positions hold no more")
            prompts = [p[-n:] for p, n in zip(prompts, room, strict=True)]
            groups: dict[str, list[int]] = {}  # what may be generated side by side
            for i, how in enumerate(asked):
                groups.setdefault(repr(how), []).append(i)
            found = [""] * len(requests)
            with Progress(console=console, disable=disable_tqdm) as bar:
                task = bar.add_task("generating", total=len(requests))
                for group in groups.values():
                    group.sort(key=lambda i: -len(prompts[i]))
                    how, texts = asked[group[0]], [[] for _ in group]
                    until = [text for text in how["until"] if text]
                    tail = 8 + 4 * max(map(len, until), default=0)  # tokens that may hold the end of a stop text

                    def done(row: int, text: list[int], until=until, tail=tail, most=how["max_gen_toks"]) -> bool:
                        end = tokenizer.decode(text[-tail:], skip_special_tokens=False)
                        ended = text[-1] in stops or any(stop in end for stop in until) or len(text) == most
                        bar.advance(task, ended)
                        return ended

                    for token in generate(
                        net,
                        [prompts[i] for i in group],
                        max_tokens=how["max_gen_toks"],
                        exit=exit,
                        loops=config.loops,
                        cache=config.cache,
                        temperature=how.get("temperature") or 0.0,
                        top_p=how.get("top_p") or 1.0,
                        batch=config.batch,
                        seeds=[f"{config.seed}/{i}" for i in group],
                        done=done,
                    ):
                        texts[token.row].append(token.id)
                        self.loops.setdefault(requests[group[token.row]].task_name, []).append(token.loops)
                    for i, ids in zip(group, texts, strict=True):
                        text = tokenizer.decode(ids, skip_special_tokens=True)
                        found[i] = min((text.partition(stop)[0] for stop in until), key=len, default=text)
            return found

    return Looped()


def harness() -> None:
    config = tyro.cli(HarnessConfig, args=sys.argv[2:], prog="eval.py harness")
    config.check()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    net, tokenizer = sample.load(config.folder, pick_device(config.device), config.dtype)
    if data.eos_id(tokenizer) is None:
        raise UserError(f"{config.folder} was not trained on text: its tokenizer has no end of text, give another")
    if config.chat:
        data.chat_prompts(tokenizer, [""])  # refuses a tokenizer without its tokens
    exit = sample.parse_exit(config.exit, config.exit_threshold, net.config.exit_threshold)
    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=config.include_path and str(config.include_path))
    unknown, names = [name for name in names if not manager.match_tasks([name])], manager.match_tasks(names)
    if unknown or not names:
        raise UserError(
            f"--tasks {config.tasks}: no task is called {', '.join(unknown) or 'that'}; see lm-eval ls tasks"
        )
    lm = harness_model(net, tokenizer, exit, config)
    how = {"num_fewshot": config.num_fewshot, "limit": config.limit, "apply_chat_template": config.chat}
    try:
        found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **how)["results"]
    except OSError as error:  # the base of what the datasets package raises
        raise UserError(f"--tasks {config.tasks}: a task's data can't be had ({error})") from error
    table = Table(
        title=f"{config.folder}, exit {exit.rule}:{exit.threshold:g}", title_justify="left", box=box.SIMPLE_HEAD
    )
    for head in ("task", "score", "loops"):
        table.add_column(head, justify="left" if head == "task" else "right")
    scores = {}
    for task, metrics in found.items():
        loops = lm.loops.get(task, [])
        mean = sum(loops) / len(loops) if loops else None
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        scores[task] = numbers | {"loops": mean, "tokens": len(loops)}
        for name, value in numbers.items():
            metric, _, filtered = name.partition(",")
            if not metric.endswith("_stderr") and "," in name:
                spread = numbers.get(f"{metric}_stderr,{filtered}")
                spread = f" ± {spread:.4f}" if spread is not None else ""
                what = metric if filtered == "none" else f"{metric} ({filtered})"
                table.add_row(f"{task}: {what}", f"{value:.4f}{spread}", "–" if mean is None else f"{mean:.2f}")
    console.print(table)
    if config.out:
        what = {"harness": scores, "exit": f"{exit.rule}:{exit.threshold:g}", "cache": config.cache}
        device = net.embed_tokens.weight.device
        model.write_json(config.out, what | provenance(device) | {"seed": config.seed})
