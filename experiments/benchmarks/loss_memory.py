"""Measure peak memory and time of log-probability, entropy and their backward pass, in two ways.

    python experiments/benchmarks/loss_memory.py [--vocab 151936 --hidden 896 --tokens 4096]

The vocabulary has a real size. "plain" computes all logits in float32, log_softmax, gather and the
entropy. "chunked" calls engine.logprobs. Each way runs in a separate process.
Memory is the process's peak minus its memory after inputs and weights were created. Both ways
compute the gradients of hidden states and weights.
"""

import argparse
import multiprocessing
import resource
import time

from timing import ratio


def peak():
    """Return this process's peak memory so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(way, vocab, hidden, tokens, pipe):
    import torch

    from engine.logprobs import chunked_logprobs_and_entropy

    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocab, hidden) / hidden**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    # allocate the gradients before measuring: in training they exist already
    states.grad, weight.grad = torch.zeros_like(states), torch.zeros_like(weight)
    before = peak()
    started = time.perf_counter()
    if way == "plain":
        log_probs = (states @ weight.T).float().log_softmax(-1)
        logp = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    else:
        logp, entropy = chunked_logprobs_and_entropy(states, weight, targets)
    logp.mean().backward()
    kib, seconds = peak() - before, time.perf_counter() - started
    check = (logp.sum().item(), entropy.sum().item(), weight.grad.norm().item())
    pipe.send((kib, seconds, *check))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("vocab", 151_936), ("hidden", 896), ("tokens", 4096), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    seconds, memory = {"plain": [], "chunked": []}, {}
    for _ in range(args.rounds):
        for way in seconds:
            here, there = context.Pipe()
            sizes = (args.vocab, args.hidden, args.tokens)
            process = context.Process(target=measure, args=(way, *sizes, there))
            process.start()
            kib, s, *check = here.recv()
            process.join()
            seconds[way].append(s)
            memory[way] = min(memory.get(way, kib), kib)
            print(
                f"{way:8s} {kib / 2**20:6.2f} GiB beyond inputs and weights  {s:6.1f} s   "
                f"log-prob {check[0]:.2f}  entropy {check[1]:.2f}  gradient norm {check[2]:.6f}"
            )
    print(
        f"chunked / plain: memory {memory['chunked'] / memory['plain']:.1%}, "
        f"time {ratio(seconds, 'chunked', 'plain')}"
    )


if __name__ == "__main__":
    main()
