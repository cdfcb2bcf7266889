# %% [markdown]
# # One step of HAPO, nothing hidden
#
# A tiny language model (the architecture of Qwen3, 0.7 million weights) adds numbers badly. On this
# page it takes **one step of reinforcement learning**, from a question to a moved weight, and then
# thirty more. Every equation of HAPO (arXiv 2509.16591) stands beside the lines that compute it and
# the numbers that these lines gave. A laptop takes seconds for it.
#
# HAPO asks of each token how uncertain the model was there, and lets that steer four things:
#
# - **A**: uncertain tokens are drawn hotter, sure ones cooler (part 4): try other ways where there
#   are some, and do not slip where there is one;
# - **B**: how good an answer is, is counted in tokens (part 7): a long answer weighs more, and the
#   tokens of a group pull neither up nor down in sum;
# - **C**: uncertain tokens that have moved learn more, sure ones that have not learn less (part 8):
#   what decides an answer is learned, what follows from it is left alone;
# - **D**: uncertain tokens may rise further, sure ones fall further (part 8): a rare way may become
#   likely, a sure mistake may go.
#
# These are the paper's reasons; [evidence](../docs/evidence.md) says what they are worth on a toy.
#
# Nothing is imported from the project before the last cell, which shows that the project computes
# the same. Questions in **bold** are worth a guess before you read on.
#
# | symbol | here | what |
# |---|---|---|
# | P, G, B | 8, 8, 64 | questions, answers to each, answers in all |
# | S, T | 15, about 30 | tokens of a question, of the longest answer |
# | V | 320 | ids that the model can say; logits beyond them are cut off |
# | (B, T) | | one number for each token of each answer, 0 behind its end |
#
# You need torch and transformers 5; with matplotlib there are figures.

# %% [markdown]
# ## 0. The model and its questions
#
# The first cell finds the files of the project. On a free notebook, where they are not there, it
# fetches them: write the project's address into `ADDRESS` first.

# %%
import inspect
import os
import pathlib
import subprocess
import sys

ADDRESS = ""  # of the project, for git clone


def find_project():
    """The folder that holds assets/tiny-qwen3: around this page, or fetched."""
    page = pathlib.Path(globals().get("__file__", "page")).resolve()
    here = pathlib.Path.cwd()
    around = [*page.parents, here, *here.parents]
    for folder in [*around, here / "project"]:
        if (folder / "assets" / "tiny-qwen3").is_dir():
            return folder
    if not ADDRESS:
        raise SystemExit("no assets/tiny-qwen3 here: start in the project, or set ADDRESS")
    print("fetching the project from", ADDRESS)
    clone = ["git", "clone", "--depth", "1", ADDRESS, "project"]
    subprocess.run(clone, check=True)
    return here / "project"


PROJECT = find_project()

# %%
try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ImportError as missing:
    raise SystemExit(f"{missing}: pip install torch transformers") from None
if not hasattr(transformers, "Qwen3ForCausalLM"):
    old_version = transformers.__version__
    raise SystemExit(f"transformers {old_version} is too old: pip install -U transformers")
try:
    import matplotlib.pyplot as plt

    plt.rcParams["figure.dpi"] = 75
except ImportError:
    plt = None
    print("no figures without matplotlib: pip install matplotlib")

torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it gives
transformers.utils.logging.disable_progress_bar()
MODEL = str(PROJECT / "assets" / "tiny-qwen3")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
V = len(tokenizer)
EOS = tokenizer.eos_token_id

G = 8  # answers to each question
CAP = 40  # tokens that an answer may have
T_BASE = 1.0  # temperature
TAU = 0.05  # how far A moves it
RHO = 0.8  # the quantile that divides sure from uncertain
EPS_LOW = 0.2  # how far a ratio may fall below 1
EPS_HIGH = 0.28  # how far it may rise above 1
UPDATES = 4  # of a step, on a quarter of its answers each
LR = 5e-5

# %%
SUMS = [
    (247, 138),
    (358, 464),
    (516, 302),
    (129, 593),
    (476, 187),
    (705, 119),
    (266, 658),
    (841, 123),
]
P = len(SUMS)


def new_model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def prompts_of(sums):
    """Token ids of the questions, (P, S). With three digits each, all have one length."""
    texts = []
    for a, b in sums:
        chat = [{"role": "user", "content": f"What is {a} + {b}?"}]
        text = tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=True,
        )
        texts.append(text)
    rows = tokenizer(texts, add_special_tokens=False)
    return torch.tensor(rows.input_ids)


policy = new_model()
prompts = prompts_of(SUMS)
S = prompts.shape[1]
print(tokenizer.decode(prompts[0]))
print("questions, tokens of each:", tuple(prompts.shape))
print("weights:", policy.num_parameters())

# %% [markdown]
# ## 1. How uncertain is the model? The entropy of a token
#
# Before each token the model gives a number, a *logit*, to each of the V ids. Their softmax is the
# **policy** π: a probability for each id. How uncertain it is there is its **entropy**, in nats:
#
# $$H = -\sum_v \pi_v \log \pi_v$$
#
# 0 means certain; a fair coin has log 2. HAPO steers by the *logarithm* of H, so small entropies
# must be exact. **The likeliest of four ids leads by 18. What does the usual formula, log Z minus
# the mean logit, give in float32?**


# %%
def log_prob_and_entropy(logits, ids):
    """log π of each id, and H: (..., V), (...) -> two tensors (...)."""
    top = logits.argmax(-1, keepdim=True)
    z = logits - logits.gather(-1, top)  # the likeliest id has 0
    others = z.exp().scatter(-1, top, 0.0)  # e^z of all ids but that one
    s = others.sum(-1)
    log_z = torch.log1p(s)
    entropy = log_z - (others * z).sum(-1) / (1 + s)
    chosen = z.gather(-1, ids[..., None])
    log_p = chosen.squeeze(-1) - log_z
    return log_p, entropy


def usual_entropy(logits):
    p = logits.softmax(-1)
    mean = (p * logits).sum(-1)
    return logits.logsumexp(-1) - mean


sure = torch.tensor([18.0, 0.0, 0.0, 0.0])
coin = torch.tensor([0.0, 0.0, -99.0, -99.0])
for name, logits in (("sure", sure), ("coin", coin)):
    _, ours = log_prob_and_entropy(logits, logits.argmax())
    usual = usual_entropy(logits)
    truth = usual_entropy(logits.double())
    print(f"{name}: truth {truth:.2e}   ours {ours:.2e}   usual {usual:.2e}")

# %% [markdown]
# The usual formula subtracts two numbers near 18 and loses everything. Ours adds terms that are
# never negative, so nothing cancels.
#
# ## 2. Sample: draw a token, append it, go on
#
# One token of each answer at a time: logits, divided by a temperature T, softmax, draw. `heat`
# makes temperatures of entropies; for now it gives T_base to all. The cache keeps what the model
# has computed for the tokens before.

# %%
parameters = inspect.signature(policy.forward).parameters
CACHE = "cache" if "cache" in parameters else "past_key_values"  # its name has changed


@torch.no_grad()
def sample(policy, prompts, seed, heat):
    """G answers to each prompt: tokens, mask, H and temperature, (B, T) each."""
    new = prompts.repeat_interleave(G, 0)
    cache = {CACHE: transformers.DynamicCache()}
    random = torch.Generator().manual_seed(seed)
    uniform = torch.rand(CAP, len(new), generator=random)
    alive = torch.ones(len(new), dtype=torch.bool)
    columns = []
    for u in uniform:
        logits = policy(new, use_cache=True, **cache).logits[:, -1, :V]
        _, H = log_prob_and_entropy(logits, logits.argmax(-1))
        T = heat(H)
        p = (logits / T[:, None]).softmax(-1)
        token = draw(p, u)
        columns.append((token * alive, alive, H * alive, T * alive))
        alive = alive & (token != EOS)
        if not alive.any():
            break
        new = token[:, None]
    return [torch.stack(column, 1) for column in zip(*columns)]


def draw(p, u):
    """The id at which the sum of the probabilities, from the left, exceeds u in [0, 1)."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    token = torch.searchsorted(cdf, u[:, None] * total, right=True)
    return token.squeeze(1).clamp_max(V - 1)


def constant(H):
    return torch.full_like(H, T_BASE)


tokens, mask, H, _ = sample(policy, prompts, seed=0, heat=constant)
print("answers, tokens of the longest:", tuple(tokens.shape))
print("answer tokens:", int(mask.sum()))
for row in (2, 7, 26, 31):
    answer = tokens[row][mask[row]]
    print(repr(tokenizer.decode(answer)))

# %% [markdown]
# The model mostly blurts out a number, and now and then writes the steps: here the first answer is
# blurted and wrong, two worked ones are right, and one slips. It does not know that steps pay.
#
# ## 3. Sure or uncertain? One h for each token
#
# Let x = log H, and $x_\rho$ its 0.8-quantile over all tokens of the batch (Eq. 5). Then (Eq. 6)
#
# $$h = \frac{x - x_\rho}{h_{max}} \ \text{ above } x_\rho, \qquad
#   h = \frac{x - x_\rho}{|h_{min}|} \ \text{ below}$$
#
# where $h_{max}$ and $h_{min}$ are the largest and the smallest $x - x_\rho$. So h is −1 at the
# surest token, 0 at the quantile, and +1 at the most uncertain one.
#
# By hand, five entropies: 0.01, 0.1, 0.5, 1 and 2. The rank of the quantile is 0.8 · 4, rounded:
# 3, counted from 0. So it lies at H = 1, where x = 0. **Which h has the entropy 0.1?**


# %%
def statistics(H):
    """Of the log-entropies of a batch, (N,): quantile, largest and smallest distance from it."""
    x = H.clamp_min(1e-8).log()
    x = x.sort().values
    rank = round(RHO * (len(x) - 1))
    quantile = x[rank]
    h_max = x[-1] - quantile
    h_min = x[0] - quantile
    return quantile, h_max, h_min


def modulation(H, stats):
    """Eq. 6: entropies of any shape -> h in [-1, 1]."""
    quantile, h_max, h_min = stats
    d = H.clamp_min(1e-8).log() - quantile
    h = torch.where(d > 0, d / h_max, -d / h_min)
    return h.clamp(-1, 1)  # with another batch's statistics it may lie outside


def rounded(values):
    return [round(value, 2) for value in values.tolist()]


five = torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0])
print("log H", rounded(five.log()))
print("h    ", rounded(modulation(five, statistics(five))))
before = statistics(H[mask])
print("this batch: quantile %.2f, h_max %.2f, h_min %.2f" % before)

# %%
if plt:
    fig, axes = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
    axes.hist(H[mask].clamp_min(1e-8).log(), 40, color="0.7")
    quantile, h_max, h_min = map(float, before)
    marks = {
        "h = −1": quantile + h_min,
        "h = 0": quantile,
        "h = +1": quantile + h_max,
    }
    for label, x in marks.items():
        axes.axvline(x, color="black", linestyle="--")
        axes.text(x, 60, label + " ", rotation=90, ha="right", va="top")
    axes.set(xlabel="x = log H", ylabel="tokens")
    axes.set_title("Most tokens are sure, by orders of magnitude: log H spreads them out")
    plt.show()

# %% [markdown]
# ## 4. HAPO A: draw uncertain tokens hotter
#
# $$T = T_{base}\,(1 + \tau h) \quad \text{(Eq. 8)}$$
#
# h needs the statistics of a whole batch, and the batch that is being drawn is not whole yet.
# **Where do they come from?** From the batch before. Here the first batch is for its statistics
# alone, and the next one is the one we learn from. (A run learns from its first batch, too, drawn
# at T_base. C and D, later, take the statistics of the batch itself.)


# %%
def heat_A(stats, tau=TAU):
    """Entropies -> temperatures, with the statistics of the batch before."""
    return lambda H: T_BASE * (1 + tau * modulation(H, stats))


tokens, mask, H_drawn, T = sample(policy, prompts, seed=8, heat=heat_A(before))
drawn_at = T[mask]
hot = (drawn_at > T_BASE).float().mean()
print(f"temperatures from {drawn_at.min():.2f} to {drawn_at.max():.2f}")
print(f"above {T_BASE}: {hot:.0%} of the tokens")

# %%
if plt:
    fig, axes = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
    entropy = H_drawn[mask].clamp_min(1e-8)
    axes.scatter(entropy, drawn_at, s=5, color="black")
    axes.axhline(T_BASE, color="0.6", linestyle=":")
    axes.set(xscale="log", xlabel="H of a token, nats", ylabel="T")
    axes.set_title("A: the surer, the cooler; a twentieth and no further")
    plt.show()

# %% [markdown]
# ## 5. Grade: right or wrong, and nothing between
#
# R = 1 if the last word is the sum, else 0.


# %%
def words_of(tokens, mask):
    texts = []
    for ids, own in zip(tokens, mask):
        text = tokenizer.decode(ids[own], skip_special_tokens=True)
        texts.append(text)
    return texts


def rewards(sums, texts):
    """(B,): 1 for a right answer, 0 for a wrong one."""
    R = torch.zeros(len(texts))
    for row, text in enumerate(texts):
        a, b = sums[row // G]
        last = text.split()[-1:]
        R[row] = last == [str(a + b)]
    return R


texts = words_of(tokens, mask)
lengths = mask.sum(1)
R = rewards(SUMS, texts)
for row in range(G):
    print(f"R = {R[row]:.0f}   {lengths[row]:2d} tokens   {texts[row]}")
groups = R.view(P, G)
right = groups.sum(1).int().tolist()
print("right answers of 8, by question:", right)

# %%
if plt:
    fig, axes = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
    place = range(1, P + 1)
    wrong = [G - n for n in right]
    axes.bar(place, right, color="0.35", label="right")
    axes.bar(place, wrong, bottom=right, color="0.85", label="wrong")
    axes.set(xlabel="question", ylabel="answers")
    axes.set_title("Question 4 is a dead group: no answer there beats another")
    axes.legend(loc="upper left")
    plt.show()

# %% [markdown]
# A group whose answers are all right, or all wrong, is **dead**: none is better than another, and
# their advantages are 0.
#
# ## 6. Score: what did the policy think of each token?
#
# Learning compares the policy with itself before: the ratio $r = \pi / \pi_{old}$. The sampler has
# already seen a probability of every token. **Why do we compute it again?** Because each token was
# drawn at a temperature of its own, and numerator and denominator must be one function: this one,
# at T_base. (It could have kept a second one; but a fast sampler rounds otherwise than a trainer,
# and then r would not be 1 where nothing has moved.)


# %%
def score(policy, lines, mask):
    """log π and H of each answer token, (B, T); lines are question and answer, (B, S + T)."""
    logits = policy(lines).logits
    logits = logits[:, S - 1 : -1, :V]  # position s predicts token s + 1
    log_p, H = log_prob_and_entropy(logits / T_BASE, lines[:, S:])
    return log_p * mask, H.detach() * mask


def whole_lines(prompts, tokens):
    questions = prompts.repeat_interleave(G, 0)
    return torch.cat([questions, tokens], 1)


lines = whole_lines(prompts, tokens)
with torch.no_grad():
    old, H = score(policy, lines, mask)
now = statistics(H[mask])
h = modulation(H, now) * mask
print("   token       H       h  log pi_old")
for t in range(lengths[0]):
    token = repr(tokenizer.decode(tokens[0, t]))
    print(f"{token:>8}  {H[0, t]:6.3f}  {h[0, t]:+6.2f}  {old[0, t]:10.3f}")


# %%
def shaded(axes, row, width=10):
    """An answer, its tokens shaded by h, with h below each."""
    for t in range(lengths[row]):
        x, y = t % width, -2 * (t // width)
        dark = float(0.5 + h[row, t] / 2)
        corner = (x - 0.5, y - 0.5)
        box = plt.Rectangle(corner, 1, 1, color=str(1 - 0.8 * dark))
        axes.add_patch(box)
        word = tokenizer.decode(tokens[row, t])
        word = word.replace("<|im_end|>", "end")
        ink = "white" if dark > 0.6 else "black"
        axes.text(x, y, word, color=ink, ha="center", va="center")
        value = f"{h[row, t]:+.1f}"
        axes.text(x, y - 0.8, value, fontsize=7, ha="center", va="center")
    axes.set(xlim=(-0.6, width - 0.4), ylim=(y - 1.3, 0.7))
    axes.axis("off")


if plt:
    fig, axes = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
    longest = int(lengths[:G].argmax())
    shaded(axes, longest)
    axes.set_title("Dark: the model was uncertain there. h stands below each token")
    plt.show()

# %% [markdown]
# ## 7. HAPO B: how much better is an answer? Counted in tokens
#
# GRPO compares each answer with the mean over the **answers** of its group. HAPO takes mean and
# standard deviation over all **tokens** of the group, each with its answer's reward (Eq. 9):
#
# $$A = \frac{R - \mu}{s + 10^{-6}}$$
#
# By hand: a right answer of 3 tokens and a wrong one of 1. The rewards of the four tokens are
# 1, 1, 1, 0. **Who gets the larger |A|?**


# %%
def advantages_B(R, lengths):
    """Rewards and lengths, (P, G) each -> (P, G): B, over tokens."""
    N = lengths.sum(1, keepdim=True)
    mean = (R * lengths).sum(1, keepdim=True) / N
    centred = R - mean
    squares = centred.square() * lengths
    variance = squares.sum(1, keepdim=True) / N
    A = centred / (variance.sqrt() + 1e-6)
    return only_live(R, A)


def advantages_GRPO(R, lengths):
    """The same over answers, with the deviation of a sample (n - 1)."""
    mean = R.mean(1, keepdim=True)
    deviation = R.std(1, keepdim=True)
    A = (R - mean) / (deviation + 1e-6)
    return only_live(R, A)


def only_live(R, A):
    best = R.amax(1, keepdim=True)
    worst = R.amin(1, keepdim=True)
    return torch.where(best > worst, A, 0.0)


token_rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
mean = token_rewards.mean()
deviation = token_rewards.std(correction=0)
print(f"mean {mean:.2f}, deviation {deviation:.3f}")
R_two = torch.tensor([[1.0, 0.0]])
tokens_two = torch.tensor([[3, 1]])
for name, rule in (("B", advantages_B), ("GRPO", advantages_GRPO)):
    a, b = rule(R_two, tokens_two)[0]
    total = 3 * a + b
    print(f"{name:5s} right {a:+.3f}, wrong {b:+.3f}, over the four tokens {total:+.3f}")

# %%
length_groups = lengths.view(P, G)
A_B = advantages_B(groups, length_groups)
A_GRPO = advantages_GRPO(groups, length_groups)
print("first group, tokens:", length_groups[0].tolist())
print("R   ", groups[0].int().tolist())
print("B   ", rounded(A_B[0]))
print("GRPO", rounded(A_GRPO[0]))
for name, a in (("B", A_B), ("GRPO", A_GRPO)):
    total = (a * length_groups).sum()
    print(f"sum over all tokens of the batch, {name}: {total:+.1f}")
A = A_B.view(-1, 1) * mask  # (B, T)

# %%
if plt:
    fig, axes = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
    place = torch.arange(G)
    axes.bar(place - 0.2, A_B[0], 0.4, color="black", label="B")
    axes.bar(place + 0.2, A_GRPO[0], 0.4, color="0.75", hatch="//", label="GRPO")
    axes.set_xticks(place, length_groups[0].tolist())
    axes.set(xlabel="tokens of the answer", ylabel="A")
    axes.set_title("B: right answers are long here, so each of their tokens wins less")
    axes.legend()
    plt.show()

# %% [markdown]
# ## 8. HAPO D and C: how far, and how much
#
# **D** (Eq. 12-13) says how far the ratio r of each token may go. A sure token may fall further:
# $\varepsilon_{low}(1 - h)$ where $h \le 0$. An uncertain one may rise further:
# $\varepsilon_{high}(1 + h)$ where $h > 0$.
#
# **C** (Eq. 10-11) turns A into $A(1 + h)$ in two cases. An uncertain token (h > 0) that has moved,
# r outside $[1 - \varepsilon_{low}/2,\ 1 + \varepsilon_{high}/2]$, learns more. A sure one that has
# not moved learns less. Else A stays.
#
# Then the clipped surrogate, as a mean over all N tokens:
#
# $$L = -\frac{1}{N} \sum \min\bigl(r A,\ \mathrm{clip}(r)\, A\bigr)$$
#
# **By hand: how far may the ratio of a token go at h = −0.5, how far at h = 0.5?**


# %%
def clip_range(h, eps_high=EPS_HIGH):
    """D: the lowest and the highest ratio of each token."""
    lowest = 1 - EPS_LOW * (1 - h.clamp_max(0))
    highest = 1 + eps_high * (1 + h.clamp_min(0))
    return lowest, highest


def redistribute(A, h, r, eps_high=EPS_HIGH):
    """C: A (1 + h) for uncertain tokens that moved and for sure ones that did not."""
    low = 1 - EPS_LOW / 2
    high = 1 + eps_high / 2
    unmoved = (r >= low) & (r <= high)
    changes = (h > 0) ^ unmoved  # uncertain and moved, or sure and unmoved: one of the two
    return torch.where(changes, A * (1 + h), A)


def surrogate(r, A, lowest, highest):
    """What each token adds to the loss. A token exactly on a bound still learns."""
    clipped = torch.where(r < lowest, lowest, r)
    clipped = torch.where(r > highest, highest, clipped)
    smaller = torch.where(clipped * A < r * A, clipped * A, r * A)
    return -smaller


one = torch.tensor([1.0, 1.0])
still_and_moved = torch.tensor([1.0, 1.2])
for value in (-0.5, 0.5):
    both = torch.tensor([value, value])
    lowest, highest = clip_range(both)
    print(f"h = {value:+.1f}   D: r from {lowest[0]:.2f} to {highest[0]:.2f}")
    a, b = redistribute(one, both, still_and_moved)
    print(f"           C: A = 1 becomes {a:.1f} at r = 1, and {b:.1f} at r = 1.2")

# %%
if plt:
    fig, pair = plt.subplots(1, 2, figsize=(5.5, 2.8), layout="constrained")
    x = torch.linspace(0.4, 1.8, 300)
    for axes, sign in zip(pair, (1.0, -1.0)):
        a = torch.full_like(x, sign)
        for value, style in ((-1.0, ":"), (0.0, "-"), (1.0, "--")):
            lowest, highest = clip_range(torch.full_like(x, value))
            loss = surrogate(x, a, lowest, highest)
            axes.plot(x, loss, style, color="black", label=f"h = {value:+.0f}")
        axes.set(xlabel="r", title=f"A = {sign:+.0f}")
    pair[0].set_ylabel("loss of a token")
    pair[0].legend()
    fig.suptitle("D: where a line is flat, the token learns no more")
    plt.show()

# %% [markdown]
# ## 9. Update: four times, on a quarter of the answers each
#
# **What is r in the first update? And what is the loss of a step that learns?** Nothing has moved
# yet, so r is exactly 1. B's advantages add up to 0 over the tokens of a group, and each quarter
# holds whole groups, so without C the loss of the first update would be 0. C shrinks those of sure
# tokens, which are most of the tokens of long, right answers: what is left of the wrong ones
# weighs more, and the loss lies above 0. What learns is the gradient.


# %%
def update(policy, optimizer, old, lines, mask, A, h, eps_high=EPS_HIGH):
    """One optimiser step on some rows: loss, gradient norm, and the ratios before it."""
    log_p, _ = score(policy, lines, mask)
    r = (log_p - old).exp()
    lowest, highest = clip_range(h, eps_high)
    A = redistribute(A, h, r.detach(), eps_high)
    loss = surrogate(r, A, lowest, highest) * mask
    loss = loss.sum() / mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item(), r.detach()


def new_optimizer(policy, lr=LR):
    return torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.1)


def stopped(r, A, lowest, highest):
    """How many tokens have passed their bound, falling and rising: the clip takes their gradient
    away."""
    fell = (r < lowest) & (A < 0)
    rose = (r > highest) & (A > 0)
    return int(fell.sum()), int(rose.sum())


optimizer = new_optimizer(policy)
updates = []
for rows in torch.arange(P * G).view(UPDATES, -1):
    part = [x[rows] for x in (old, lines, mask, A, h)]
    loss, norm, r = update(policy, optimizer, *part)
    updates.append((loss, norm))
    far = (r - 1).abs() * mask[rows]
    print(f"loss {loss:+.4f}   gradient {norm:.2f}   largest |r - 1| {far.max():.2f}")

# %%
with torch.no_grad():
    new, _ = score(policy, lines, mask)
r = (new - old).exp()
print(f"mean r of tokens that should rise: {r[A > 0].mean():.3f}")
print(f"mean r of tokens that should fall: {r[A < 0].mean():.3f}")
for name, height in (("D", h), ("one range for all", 0 * h)):
    fell, rose = stopped(r, A, *clip_range(height))
    print(f"a fifth update would stop {fell} falling and {rose} rising tokens by {name}")

# %%
if plt:
    fig, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for sign, marker in ((1, "^"), (-1, "v")):
        own = mask & (A * sign > 0)
        name = "A > 0" if sign > 0 else "A < 0"
        axes.scatter(h[own], r[own], s=9, marker=marker, label=name, alpha=0.6)
    grid = torch.linspace(-1, 1, 101)
    for edge in clip_range(grid):
        axes.plot(grid, edge, color="black")
    axes.set(xlabel="h", ylabel="r after the step", ylim=(0.3, 2.0))
    axes.set_title("After four updates: ▲ above, ▼ below the lines of D learn no more")
    axes.legend(loc="upper left")
    plt.show()

# %% [markdown]
# Of the falling tokens D stops as many as one range for all would: they are uncertain ones, whose
# lower bound D leaves alone. Of the rising ones it stops fewer.
#
# ## 10. Change something
#
# Here is the whole step once more, as one function. **Predict before you run the next cell:**
#
# 1. ε_high doubled: does the first update change? Are fewer tokens stopped?
# 2. B off, GRPO's advantages instead: where does the loss of the first update go?
# 3. τ = 0.5 instead of 0.05: what becomes of temperatures, answers and rewards?


# %%
def one_step(policy, optimizer, sums, seed, stats, tau=TAU, eps_high=EPS_HIGH, rule=advantages_B):
    """From questions to moved weights: what happened, and the statistics for the next step."""
    prompts = prompts_of(sums)
    heat = heat_A(stats, tau) if stats else constant  # A
    tokens, mask, H_drawn, T = sample(policy, prompts, seed, heat)
    R = rewards(sums, words_of(tokens, mask))
    lines = whole_lines(prompts, tokens)
    with torch.no_grad():
        old, H = score(policy, lines, mask)
    h = modulation(H, statistics(H[mask])) * mask
    lengths = mask.sum(1).view(-1, G)
    A = rule(R.view(-1, G), lengths)  # B
    A = A.view(-1, 1) * mask
    losses = []
    for rows in torch.arange(len(R)).view(UPDATES, -1):
        part = [x[rows] for x in (old, lines, mask, A, h)]
        if A[rows].any():  # else all its groups are dead
            loss, *_ = update(policy, optimizer, *part, eps_high)  # C, D
            losses.append(loss)
    batch = (old, lines, mask, A, h)
    seen = dict(R=R, T=T[mask], losses=losses, batch=batch)
    return seen, statistics(H_drawn[mask])


# %%
changes = {
    "as it is": {},
    "eps_high doubled": {"eps_high": 2 * EPS_HIGH},
    "B off": {"rule": advantages_GRPO},
    "tau = 0.5": {"tau": 0.5},
}
for name, change in changes.items():
    again = new_model()
    seen, _ = one_step(again, new_optimizer(again), SUMS, 8, before, **change)
    was, lines_again, own, A_again, h_again = seen["batch"]
    with torch.no_grad():
        then, _ = score(again, lines_again, own)
    edges = clip_range(h_again, change.get("eps_high", EPS_HIGH))
    fell, rose = stopped((then - was).exp(), A_again, *edges)
    T_again, first = seen["T"], seen["losses"][0]
    print(f"{name:17s} first loss {first:+.4f}   then stopped: {fell} falling, {rose} rising")
    print(f"{'':17s} T {T_again.min():.2f} to {T_again.max():.2f}   right: {seen['R'].sum():.0f}")

# %% [markdown]
# The first update does not know ε_high: every ratio is 1, and so is inside C's zone however wide
# that is. After the step fewer rising tokens are beyond their bound, and as many falling ones.
# Without B the advantages no longer add up to 0 over tokens: right answers are longer here, so the
# loss falls below 0. With τ = 0.5 sure tokens are drawn colder and uncertain ones much hotter:
# other answers, and by luck of this seed more right ones. None of these losses says which change is
# better. The loss does not measure learning, and one step of one seed decides nothing.
#
# ## 11. Thirty steps
#
# The same function, thirty times, on sixteen new questions each, with a learning rate of 0.0002.
# How often are its answers right, and how often if it is asked almost without chance, at T = 0.05?

# %%
STEPS = int(os.environ.get("LESSON_STEPS", "30"))


def some_sums(count, seed):
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(100, 1000, (count, 2), generator=random)
    return [tuple(pair) for pair in numbers.tolist()]


def asked_coldly(policy):
    sums = some_sums(16, seed=0)
    cold = lambda H: torch.full_like(H, 0.05)
    tokens, mask, *_ = sample(policy, prompts_of(sums), 0, cold)
    R = rewards(sums, words_of(tokens, mask))
    return R.mean().item()


policy = new_model()
optimizer = new_optimizer(policy, lr=0.0002)
stats, accuracy, length = None, [], []
print(f"before: {asked_coldly(policy):.2f} right at T = 0.05")
for step in range(1, STEPS + 1):
    seen, stats = one_step(policy, optimizer, some_sums(16, step), step, stats)
    accuracy.append(seen["R"].mean().item())
    own = seen["batch"][2]
    mean = own.sum(1).float().mean()
    length.append(mean.item())
    if step % 10 == 0:
        last = accuracy[-5:]
        print(f"step {step}: {sum(last) / 5:.2f} right in the last five steps")
print(f"after {STEPS}: {asked_coldly(policy):.2f} right at T = 0.05")

# %%
if plt and STEPS:
    fig, pair = plt.subplots(2, 1, figsize=(5.5, 3.6), layout="constrained")
    steps = range(1, STEPS + 1)
    pair[0].plot(steps, accuracy, "o-", color="black", markersize=3)
    pair[0].set(ylabel="share right")
    pair[1].plot(steps, length, "s--", color="0.4", markersize=3)
    pair[1].set(xlabel="step", ylabel="tokens of an answer")
    fig.suptitle("It learns that working out a sum pays: longer answers, more of them right")
    plt.show()

# %% [markdown]
# ## What changes on a real model
#
# - The vocabulary has 150,000 ids and more. Whole logits as here do not fit, so they are computed a
#   part at a time. Questions differ in length, and are padded on the left.
# - The learning rate falls to a millionth, answers grow to thousands of tokens, and most of the
#   time goes into sampling.
# - Weights are split over GPUs; the statistics are those of the tokens on all of them.
#
# The step stays what it was here: `train.train_step` takes it in this order, and `python train.py`
# runs it. BuPO's first phase has [a page of its own](bupo_phase.ipynb).
#
# [A page](../docs/explorer.html) shows these formulas for every token of a run, with the token's
# numbers, and computes them under other settings. Open the file in a browser:
#
# ![one token's formulas with its numbers](../assets/page.png)
#
# ## The project computes the same
#
# (If you have changed an equation above, the line that compares it ends with an error here.)

# %%
sys.path.insert(0, str(PROJECT))
import hapo
import losses

theirs = hapo.entropy_stats(H, mask)
low, high = hapo.adaptive_clip(h, EPS_LOW, EPS_HIGH)
lowest, highest = clip_range(h)
pairs = {
    "5   quantile": (theirs.pivot, now[0]),
    "6   h": (hapo.modulation(H, theirs, mask), h),
    "8   A": (hapo.adaptive_temperature(H, theirs), heat_A(now)(H)),
    "9   B": (hapo.token_group_advantages(R, mask, G), A),
    "10  C": (
        hapo.redistribute_advantages(A, h, r, EPS_LOW, EPS_HIGH),
        redistribute(A, h, r),
    ),
    "12  D, low": (1 - low, lowest),
    "13  D, high": (1 + high, highest),
    "    surrogate": (
        losses.clipped_surrogate(r, A, low, high),
        surrogate(r, A, lowest, highest),
    ),
    "    GRPO": (losses.grpo_advantages(R, G), A_GRPO.flatten()),
}
for name, (project, page) in pairs.items():
    difference = (project - page).abs().max()
    print(f"Eq. {name:14s} largest difference {difference:.0e}")
    assert difference < 1e-6, name
