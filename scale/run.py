"""What surrounds the steps of a run: loading, picking up where it stopped, describing itself, and ending."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil
from dataclasses import dataclass

import torch

import bupo
import hapo
import internals
from sampling import eos_ids_of
from scale import checkpoint, memory, shard
from scale.guard import Guard
from scale.load import fit_context, load_config, load_model, load_tokenizer
from scale.options import Options
from scale.report import samples_of, write_lines
from scale.seeds import seed_of
from tasks import BadInput, load_problems, read_problems


@dataclass
class Run:
    """What lives from step to step. `drawn`, `layer`, `stats` and the guard's numbers are saved with every checkpoint."""

    options: Options
    world: shard.World
    policy: torch.nn.Module
    actor: torch.nn.Module  # draws the answers: the policy itself on a CPU, else its replica in the compute dtype
    reference: torch.nn.Module  # the initial model, only with --kl
    tokenizer: object
    eos_ids: list
    items: list  # (problem, prompt ids) to train on
    held_out: list  # problems
    out: pathlib.Path
    guard: Guard
    optimizer: torch.optim.Optimizer = None
    tokenizer_files: dict = dataclasses.field(default_factory=dict)  # as every checkpoint holds them
    drawn: int = 0  # prompts drawn so far: the position in the data
    layer: int = None  # BuPO's layer
    stats: hapo.EntropyStats = None  # of the last batch, for the sampler of the next
    diagnosed: tuple = None  # the fixed answers of --diagnose-every
    last_batch: object = None  # the last that was drawn

    def say(self, text):
        if self.world.main:
            print(text, flush=True)

    def make_optimizer(self):
        """AdamW in float32. BuPO needs nothing special: a weight without a gradient is passed by, decay and moments included."""
        o = self.options
        if self.layer is not None and o.bupo_arm == "layer-lr":
            groups = bupo.layerwise_groups(self.policy, self.layer, o.lr)
        else:
            groups = [{"params": list(self.policy.parameters()), "lr": o.lr}]
        for group in groups:
            group["peak_lr"] = group["lr"]
        return torch.optim.AdamW(groups, lr=o.lr, weight_decay=o.weight_decay, fused=True)

    def state(self):
        return {"drawn": self.drawn, "layer": self.layer, "stats": self.stats and [float(x) for x in self.stats], "guard": self.guard.state(), "diagnosed": self.diagnosed and [x.tolist() for x in self.diagnosed]}

    def restore(self, state):
        self.drawn, self.layer = state["drawn"], state["layer"]
        self.stats = state["stats"] and hapo.EntropyStats(*(torch.tensor(x, device=self.world.device) for x in state["stats"]))
        self.diagnosed = state["diagnosed"] and tuple(torch.tensor(x, device=self.world.device) for x in state["diagnosed"])
        self.guard.restore(state["guard"])


def draw_items(run):
    """The next P prompts: a new permutation of the data every epoch, a function of the seed and of how many were drawn."""
    items = []
    for i in range(run.drawn, run.drawn + run.options.prompts_per_step):
        epoch, place = divmod(i, len(run.items))
        items.append(run.items[_permutation(len(run.items), run.options.seed, epoch)[place]])
    run.drawn += len(items)
    return items


@functools.lru_cache(maxsize=2)
def _permutation(size, seed, epoch):
    return random.Random(seed_of(seed, "epoch", epoch)).sample(range(size), size)


def open_run(o, world):
    """(run, step it stands at): the newest whole checkpoint of an old run; or a new run, and None."""
    shard.check_world(o, world)
    say = print if world.main else lambda *args, **kwargs: None
    out = pathlib.Path(o.out)
    found = checkpoint.newest_whole(out, say) if o.resume else None
    if o.resume and found is None:
        say(f"no whole checkpoint in {out}: starting from the beginning")
    source = str(found or o.model)
    config = load_config(source)
    if o.resume and found:
        check_fingerprint(o, found)

    if world.sharded:
        policy, tokenizer = shard.shard_model(source, world, o.offload), load_tokenizer(source)
    else:
        policy, tokenizer = load_model(source, world.device)
    reference = None
    if o.kl:
        reference = shard.shard_model(o.model, world, o.offload) if world.sharded else load_model(o.model, world.device)[0]
        reference.requires_grad_(False)
    if o.gradient_checkpointing:
        enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)  # its name from transformers 5.20 on
        enable({"use_reentrant": False})
    policy.train()
    no_dropout(policy)
    internals.decoder_body(policy)
    if o.bupo_layer and o.bupo_layer != "auto":
        internals.check_layer(policy, int(o.bupo_layer))

    items, held_out = load_data(o, tokenizer, config, say)
    guard = Guard(say)
    run = Run(o, world, policy, shard.make_actor(policy, world), reference, tokenizer, eos_ids_of(policy, tokenizer), items, held_out, out, guard)
    run.optimizer = run.make_optimizer()
    if not run.eos_ids:
        say("note: neither the model nor the tokenizer names an end-of-sequence token; answers end at --max-new-tokens only")
    step = checkpoint.restore(run, found) if found else None
    describe(run, config, say)
    if world.main:
        prepare_folder(o, out, -1 if step is None else step)
    return run, step


def check_fingerprint(o, found):
    """--model beside --resume, or a folder copied together from two runs: model and tokenizer must be the checkpoint's."""
    started_with = json.loads((pathlib.Path(o.out) / "config.json").read_text())["model"]
    if o.model == started_with and not pathlib.Path(o.model).exists():
        return  # a hub's, or moved away since: the checkpoint holds everything that is needed
    stored = json.loads((found / "run.json").read_text())["fingerprint"]
    current = checkpoint.fingerprint(load_config(o.model), load_tokenizer(o.model))
    for part in ("model", "tokenizer"):
        if stored[part] != current[part]:
            raise BadInput(f"--resume: {found} was made with another {part} than --model {o.model}; name the model the run was started with, or another --out")


def load_data(o, tokenizer, config, say):
    """([(problem, prompt ids)] to train on, held-out problems); prompts that leave no room for an answer are dropped and counted."""
    if o.eval_data:
        train_set, held_out = read_problems(o.data), read_problems(o.eval_data, "--eval-data")
    else:
        train_set, held_out = load_problems(o.task, o.data or None, o.difficulty, held_out=o.eval_prompts)
    fitting = [fit_context(problems, tokenizer, config, o.max_new_tokens, say) for problems in (train_set, held_out)]
    return fitting[0], [problem for problem, _ in fitting[1]]


def no_dropout(policy):
    """Old and new log-probabilities must come from one function: dropout would make every ratio a random number."""
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def prepare_folder(o, out, step):
    """The run's folder with its options; lines of metrics and samples that are later than `step` go."""
    if o.overwrite and (out / "config.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(out / "config.json", json.dumps(dataclasses.asdict(o), indent=1) + "\n")
    for name in ("metrics.jsonl", "samples.jsonl"):
        checkpoint.keep_lines(out / name, step)


def describe(run, config, say):
    o = run.options
    prompt = max(len(ids) for _, ids in run.items[:1000])
    cuda = run.world.device.type == "cuda"
    capacity = torch.cuda.get_device_properties(run.world.device).total_memory if cuda else None
    need = memory.estimate(config, o, prompt, run.world.size, cuda)
    if capacity and need.peak > capacity:
        raise BadInput(f"this run needs {need.peak / memory.GIB:.1f} GiB and the device has {capacity / memory.GIB:.1f}; try {memory.what_to_change(need, o)}")
    layers = internals.layer_count(run.policy)
    say(f"{o.algo} on {o.data or o.task}: {len(run.items)} questions to train on, {len(run.held_out)} held out; {o.model}, {need.parameters / 1e6:.2f} M parameters, {layers} layers")
    say(f"a step: {o.prompts_per_step} prompts x {o.answers_per_prompt} answers = {o.answers_per_step}, {o.updates_per_rollout} updates of {o.answers_per_update} answers, "
        f"in passes of {f'{o.micro_tokens} tokens' if o.micro_tokens else f'{o.micro_batch or o.answers_per_update // run.world.size} answers'}; {run.world.size} process(es)")
    say(f"weights and moments {str(next(run.policy.parameters()).dtype)[6:]}, compute {'bfloat16 autocast' if cuda else 'float32'} on {run.world.device}; peak memory about {need.peak / memory.GIB:.2f} GiB a process (--estimate: its parts on a GPU)")
    say(f"the first prompt ({len(run.items[0][1])} tokens):\n{run.tokenizer.decode(run.items[0][1])}\n")


def finish(run):
    """The trained model as final/, and the curves."""
    weights, _ = checkpoint.gather(run)
    if run.world.main:
        with checkpoint.disk_faults_in_one_line(run.out, "the final model", run.out / "final"):
            checkpoint.save_model(run, run.out / "final", weights)
        run.say(f"done: {run.out / 'final'} holds the model, metrics.jsonl and samples.jsonl what happened")
        try:
            from scripts.curves import plot
        except ImportError:
            run.say(f"no curves.png without matplotlib: pip install matplotlib, then python scripts/curves.py {run.out}")
        else:
            run.say(f"curves: {plot([run.out])}")


def give_up(run, step):
    """Too many bad steps in a row: leave the last answers on disk and stop with the last good checkpoint."""
    where, o = run.out / f"bad-step-{step}.jsonl", run.options
    if run.last_batch is not None and run.world.main:
        worst = torch.argsort(run.last_batch.rollout.logp.sum(1))[:32].tolist()
        write_lines(where, samples_of(step, run, worst))
    answers = f"the last answers are in {where}" if run.last_batch is not None else "no answer could be drawn"
    raise BadInput(f"{run.guard.bad_in_a_row} bad steps in a row (NaN or infinity), stopped at step {step}; the last good checkpoint is {checkpoint.folders(run.out, step)[0]}, "
                   f"{answers}. Lower --lr {o.lr:g} or --grad-clip {o.grad_clip:g} and start again from that checkpoint with --model")
