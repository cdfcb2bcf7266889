"""Replay decoding steps as CUDA graphs: one fixed sequence of kernels on static buffers.

An eager step of a small model is about a thousand kernel launches, and Python issues them more
slowly than the GPU runs them. Here a step is recorded once as a CUDA graph and then replayed by a
single launch. So no operation in it may depend on data or on a number of the host: the position at
which keys and values are written, the mask and the position ids are tensors that the step itself
updates. The graph also draws the token. The loop checks for finished rows only once in CHECK steps,
since a check synchronizes with the host. Between checks, finished rows continue and their later
tokens are dropped. After a check, unfinished rows move to the front and a graph with fewer rows is
used if it holds them.

`decode` draws the same tokens as `decode` in engine/decoding.py. On a CPU the same steps run
without being recorded.

Graphs are recorded again for every rollout: a graph holds the addresses of its buffers, and the
buffers are freed for the update, whose peak memory is larger. Only one graph exists at a time,
since destroying a graph clears the workspace of every graph on its stream.

Shapes: B rows of the rollout, n of them in the current step, S prompt positions, L key positions
that the current step sees, T response positions, V vocabulary.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from engine.forward import next_logits
from sampling import Drawn, NonFinite

BUCKETS = (512, 384, 256, 192, 128, 96, 64, 32)  # row counts of later graphs; the first has B rows
KEYS_STEP = 256  # L is a multiple of this number
CHECK = 16  # decode steps between checks for finished rows; each check synchronizes with the GPU


def why_not(config, device):
    """Return None if this model's steps can be recorded as a graph, else the reason as one line."""
    if torch.device(device).type != "cuda":
        return "graphs are CUDA's"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in [rope, *(v for v in rope.values() if isinstance(v, dict))]:  # one per kind of layer
        if kind.get("rope_type") in ("dynamic", "longrope"):
            return f"its rope scaling ({kind['rope_type']}) depends on the length of the text"
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return "which experts a token takes may be asked of the card"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}; only sdpa takes any mask"
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of another kind ({', '.join(sorted(others))})"
    return None


def decode(model, logits, cache, prompt_mask, G, cap, ends, draw_next):
    """Decode after prefill: return the fields of a Rollout by name, `cap` tokens wide.

    logits (P, V) and cache come from prefill. `ends` (V,) is true for ids that end a response.
    draw_next(logits, t, row) draws token t of the rollout's rows `row`.
    """
    steps = _Steps(model, cache, prompt_mask, G, cap)
    responses = _Responses(steps, cap, ends, draw_next)
    responses.draw(logits.repeat_interleave(G, 0))
    for t in range(1, cap + 1):
        if t % CHECK == 0 or t == cap:
            live = responses.look(t)
            if t == cap or not live:
                break
            steps.drop_all_but(live)
        steps.advance(t, responses.draw)
    return responses.tensors()


class _Steps:
    """The rows being decoded, and the model's step on them.

    Only the first n rows of every buffer are in use.
    """

    def __init__(self, model, cache, prompt_mask, G, cap):
        self.model = model
        device, self.S = prompt_mask.device, prompt_mask.shape[1]
        total = -(-(self.S + cap) // KEYS_STEP) * KEYS_STEP
        self.place = torch.full((1,), self.S, device=device)  # key position of the next token
        self.columns = torch.arange(total, device=device)
        self.cache = DynamicCache()
        while cache.layers:  # one at a time, to free each layer's prefill keys and values early
            layer = cache.layers.pop(0)
            static = _StaticLayer(layer.keys, layer.values, G, total, self.place)
            self.cache.layers.append(static)
        visible = torch.zeros(len(prompt_mask) * G, total, dtype=torch.bool, device=device)
        visible[:, : self.S] = prompt_mask.repeat_interleave(G, 0)
        self.n, self.visible = len(visible), visible
        self.token = torch.zeros_like(visible[:, :1], dtype=int)
        self.position = visible.sum(1, keepdim=True)
        self.row = torch.arange(self.n, device=device)  # each row's number in the rollout
        self.alive = torch.ones(self.n, dtype=torch.bool, device=device)
        self.length = torch.zeros_like(self.row)
        self.captures, self.shape, self.graph = device.type == "cuda", None, None

    def drop_all_but(self, live):
        """Move the rows `live` into the first rows, in place of finished ones, and shrink n.

        Nothing changes unless a smaller graph can hold all rows in `live`.
        """
        n = min((b for b in BUCKETS if b >= len(live)), default=self.n)
        if n >= self.n:
            return
        device, front = self.row.device, set(live)
        movers = [slot for slot in live if slot >= n]
        holes = [slot for slot in range(n) if slot not in front][: len(movers)]
        holes, movers = torch.tensor([holes, movers], dtype=torch.long, device=device)
        for layer in self.cache.layers:
            layer.move(holes, movers)
        for name in ("visible", "token", "position", "row", "alive", "length"):
            value = getattr(self, name)
            setattr(self, name, value.index_copy_(0, holes, value[movers])[:n])
        self.n = n

    def advance(self, t, draw):
        """Feed the last token and draw response token t."""
        last = (self.S + t - 1) // CHECK * CHECK + 2 * CHECK  # written before L is looked at again
        L = min(-(-last // KEYS_STEP) * KEYS_STEP, len(self.columns))
        if (self.n, L) != self.shape:  # the first step of a shape runs eagerly, as a warm-up
            self.shape, self.graph = (self.n, L), None
            for layer in self.cache.layers:
                layer.show(self.n, L)
            self._step(draw)
        elif not self.captures:
            self._step(draw)
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # no shared memory pool: such a pool must never be left without a graph
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._step(draw)
            self.graph.replay()  # capturing only records: the step has not run yet
        else:
            self.graph.replay()

    def _step(self, draw):
        L = self.shape[1]
        self.visible.masked_fill_(self.columns == self.place, True)
        mask = self._mask(self.visible[:, :L], self.columns[:L])
        logits = next_logits(self.model, self.token, mask, self.position, self.cache)
        self.position.add_(1)
        self.place.add_(1)
        draw(logits)

    def _mask(self, visible, columns):
        """Return the term added to attention logits, (n, 1, 1, L), or {kind of layer: term}."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        full = self._additive(visible)
        if not window:
            return full
        sliding = self._additive(visible & (columns > self.place - window))
        if "sliding_attention" not in (getattr(config, "layer_types", None) or []):
            return sliding if getattr(config, "layer_types", None) is None else full
        return {"full_attention": full, "sliding_attention": sliding}

    def _additive(self, visible):
        like = dict(dtype=self.cache.layers[0].keys.dtype, device=visible.device)
        return torch.zeros(visible.shape, **like).masked_fill(~visible, -torch.inf)[:, None, None]


class _StaticLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, S + T or more, size).

    New ones are written at the position in the tensor `place`. A step sees the first n rows and the
    first L positions.
    """

    def __init__(self, keys, values, repeats, total, place):
        super().__init__()
        self.is_initialized, self.place = True, place
        self.buffers = [self._buffer(x, repeats, total) for x in (keys, values)]

    @staticmethod
    def _buffer(x, repeats, total):
        rows, heads, filled, size = x.shape
        # zeros: attention multiplies masked positions by 0, and 0 x NaN would be NaN
        buffer = x.new_zeros(rows * repeats, heads, total, size)
        buffer[:, :, :filled] = x.repeat_interleave(repeats, 0)
        return buffer

    def show(self, rows, length):
        self.keys, self.values = (b[:rows, :, :length] for b in self.buffers)

    def move(self, holes, movers):
        for buffer in self.buffers:
            buffer.index_copy_(0, holes, buffer[movers])

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


class _Responses:
    """The tokens drawn so far, which each check copies to tables with the rollout's rows."""

    def __init__(self, steps, cap, ends, draw_next):
        self.steps, self.ends, self.draw_next, self.written = steps, ends, draw_next, 0
        self.t = torch.zeros(1, dtype=torch.long, device=steps.row.device)  # the next position
        table = torch.zeros(steps.n, cap, device=steps.row.device)
        self.tables = {name: table.clone() for name in Drawn._fields[1:]}
        self.tables["tokens"] = table.long()
        # the last CHECK tokens of each row being decoded
        self.recent = {name: x[:, :CHECK].clone() for name, x in self.tables.items()}
        self.lengths = torch.zeros_like(steps.row)
        self.finished = torch.zeros_like(steps.alive)
        self.bad = torch.full((1,), -1, device=steps.row.device)  # of the first NaN; -1: none

    def draw(self, logits):
        """Draw the next token of every row from its logits, (n, V). This is part of the graph."""
        steps, column = self.steps, self.t % CHECK
        drawn = self.draw_next(logits, self.t, steps.row)
        broken = (steps.alive & ~drawn.logp.isfinite()).any() & (self.bad < 0)
        self.bad.copy_(torch.where(broken, self.t, self.bad))
        for name, value in drawn._asdict().items():
            self.recent[name][: steps.n].index_copy_(1, column, value[:, None])
        steps.token.copy_(drawn.tokens[:, None])
        steps.length.add_(steps.alive)
        steps.alive.logical_and_(~self.ends[drawn.tokens])
        self.t.add_(1)

    def look(self, t):
        """Return the indices (below n) of the rows that are unfinished after t tokens.

        This synchronizes with the GPU. NonFinite if a logit was NaN or infinite.
        """
        steps = self.steps
        *alive, bad = torch.cat([steps.alive.long(), self.bad]).tolist()
        if bad >= 0:
            raise NonFinite(f"the model's logits are NaN or infinite at response position {bad}")
        for name, table in self.tables.items():
            drawn = self.recent[name][: steps.n, : t - self.written]
            table[steps.row, self.written : t] = drawn
        self.lengths[steps.row], self.finished[steps.row] = steps.length, ~steps.alive
        self.written = t
        return [slot for slot, lives in enumerate(alive) if lives]

    def tensors(self):
        """Return the fields of sampling.Rollout by name, with 0 after the end of a response."""
        width = self.tables["tokens"].shape[1]
        mask = torch.arange(width, device=self.lengths.device) < self.lengths[:, None]
        kept = {name: torch.where(mask, x, 0) for name, x in self.tables.items()}
        return {"mask": mask, "finished": self.finished, **kept}
