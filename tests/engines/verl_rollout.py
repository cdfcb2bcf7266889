"""A rollout for tests of verl's whole loop on a CPU: transformers draws the responses.

verl's own rollouts are vLLM and SGLang, on GPUs. This one is registered as rollout.name=toy: a
worker writes its trained weights to a file, and an actor of Ray reads them and draws. It applies
mechanism A where the agent loop hands it statistics, by the rule that vLLM's processor has.
"""

import asyncio
import os
import pathlib

import ray
import torch
import verl_cpu
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

WEIGHTS = pathlib.Path(os.environ["TOY_WEIGHTS"])


class ToyRollout(BaseRollout):
    """In the worker: takes the trained weights."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=None, **more):
        state = {name: x.detach().cpu().clone() for name, x in weights}
        mine = WEIGHTS.with_suffix(f".{os.getpid()}")  # every rank has the whole weights
        torch.save((global_steps, state), mine)
        mine.rename(WEIGHTS)


@ray.remote
class ToyServer:
    def __init__(self, path, length):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.eos = AutoTokenizer.from_pretrained(path).eos_token_id
        self.length, self.seen, self.steps, self.waiting = length, None, 0, []

    def refresh(self):
        stamp = WEIGHTS.stat().st_mtime_ns if WEIGHTS.exists() else None
        if stamp != self.seen:
            self.steps, state = torch.load(WEIGHTS, weights_only=True)
            state = {name: x.float() for name, x in state.items()}
            wrong = self.model.load_state_dict(state, strict=False)
            assert not wrong.unexpected_keys and wrong.missing_keys in ([], ["lm_head.weight"])
            self.seen = stamp

    async def generate(self, request_id, prompt_ids, sampling_params, **more):
        """Requests of one moment are drawn together."""
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt_ids, sampling_params, done))
        await asyncio.sleep(0.05)
        if self.waiting:
            self.draw()
        tokens, logps = await done
        return TokenOutput(
            token_ids=tokens,
            log_probs=logps,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.steps},
        )

    @torch.no_grad()
    def draw(self):
        import hapo
        import sampling

        self.refresh()
        waiting, self.waiting = self.waiting, []
        by_settings = {}
        for prompt, settings, done in waiting:
            given = (settings.get("extra_args") or {}).get("hapo")
            key = (settings["temperature"], None if given is None else tuple(given))
            by_settings.setdefault(key, []).append((prompt, done))
        for (base, given), asked in by_settings.items():
            temperature = base
            if given is not None:
                *stats, tau, at, form = given
                assert at == base == 1  # this sampler's entropies are those of raw logits
                stats = hapo.EntropyStats(*torch.tensor(stats))
                how = dict(stats=stats, base=base, tau=tau, form=form)
                temperature = lambda H, t, how=how: hapo.adaptive_temperature(H, **how)
            prompts = [list(prompt) for prompt, _ in asked]
            drawn = sampling.generate(self.model, prompts, 1, self.length, [self.eos], temperature)
            for row, (tokens, (_, done)) in enumerate(zip(drawn.responses(), asked)):
                done.set_result((tokens, drawn.logp[row, : len(tokens)].tolist()))

    def nothing(self, *args, **more):
        pass

    sleep = wake_up = abort_all_requests = resume_generation = clear_kv_cache = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class ToyReplica(RolloutReplica):
    async def launch_servers(self):
        options = ToyServer.options(name=f"toy_{self.replica_rank}")
        server = options.remote(self.model_config.path, self.config.response_length)
        await server.nothing.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = f"toy:{self.replica_rank}"


_ROLLOUT_REGISTRY[("toy", "async")] = "verl_rollout.ToyRollout"
RolloutReplicaRegistry.register("toy", lambda: ToyReplica)
verl_cpu.prepare()
