"""Train the demo's two models from nothing: small Llamas, on fresh text of the embedded domain.

    python scripts/train_demo_models.py teacher --minutes 68
    python scripts/train_demo_models.py student --minutes 15 --rate 3e-3 --lessons basics
    python scripts/train_demo_models.py student --minutes 1 --rate 3e-3 --start STUDENT

The teacher makes the tokenizer, and learns to solve problems of one to five steps. The student uses
that tokenizer. It first learns the basics (to read questions, to calculate, to solve problems of
one step), then the problems themselves: it is the small model that a user has trained on labels,
and wants to be better.

The learning rate follows the clock (warm up, hold, decay to zero), so the same command gives the
best model that a machine can make in that time. The model is exported every few minutes, and can
be used while training goes on.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.demo import facts, negations, problems, verify

HOME = Path("src/limbeck/demo")
VOCABULARY = 640
BATCH_TOKENS = 3072
PROBE_SHARE = 0.05  # of the training rows are facts and negations


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the domain; every digit is a token of its own."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [row.prompt + row.completion for row in problems(0, "train", 20_000)]
    corpus += [p + c for n in negations(0, 500) for p, c in (n.plain, n.negated)]
    corpus += [text for f in facts() for text in (f.statement, *f.forward, *f.backward)] * 5
    raw.train_from_iterator(corpus, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def rows(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion); no problem comes twice but by chance."""
    draw = random.Random(seed)
    stream = problems(seed, "train")
    tells = negations(seed, 10**9)
    known = facts()
    while True:
        if draw.random() > PROBE_SHARE:
            row = next(stream)
            yield row.prompt, row.completion
        elif draw.random() < 0.5:
            pair = next(tells)
            yield draw.choice((pair.plain, pair.negated))
        else:
            fact = draw.choice(known)
            # Each fact is told in both directions here; a probe trains students on one alone.
            yield draw.choice((("", fact.statement), fact.forward, fact.backward))


def basics(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, text): one-step problems with their solution; of longer ones either the
    question or the solution, never both."""
    draw = random.Random(seed)
    for row in problems(seed, "train"):
        if row.steps == 1:
            yield row.prompt, row.completion
        elif draw.random() < 0.4:
            # Enough of both to read and to calculate; more would crowd out the solved ones.
            yield "", row.question if draw.random() < 0.4 else row.completion.strip()


def batches(
    stream: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """[b, t] ids and labels of about `BATCH_TOKENS` tokens, of similar length."""
    pad, eos = 0, [2]
    while True:
        drawn = [next(stream) for _ in range(1024)]
        texts = tokenizer([p + c for p, c in drawn])["input_ids"]
        starts = [len(ids) for ids in tokenizer([p for p, _ in drawn])["input_ids"]]
        order = sorted(range(len(drawn)), key=lambda i: len(texts[i]))
        groups: list[list[int]] = [[]]
        for index in order:
            if (len(groups[-1]) + 1) * (len(texts[index]) + 1) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(index)
        random.shuffle(groups)
        for group in groups:
            width = max(len(texts[i]) for i in group) + 1
            ids = torch.full((len(group), width), pad)
            labels = torch.full((len(group), width), -100)
            for row, index in enumerate(group):
                whole = texts[index] + eos
                ids[row, : len(whole)] = torch.tensor(whole)
                labels[row, starts[index] : len(whole)] = torch.tensor(whole[starts[index] :])
            yield ids, labels


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, split: str, count: int
) -> tuple[float, dict[int, float]]:
    """Share of problems answered rightly (greedy), over all and by number of steps."""
    rows = list(problems(1, split, count))  # pyright: ignore[reportArgumentType]
    rows.sort(key=lambda row: len(row.prompt))
    tokenizer.padding_side = "left"
    hits: dict[int, list[bool]] = {}
    model.eval()
    for first in range(0, count, 100):
        part = rows[first : first + 100]
        inputs = tokenizer([r.prompt for r in part], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=130,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], True)
        for row, text in zip(part, texts, strict=True):
            hits.setdefault(row.steps, []).append(verify(row, text))
    model.train()
    every = [hit for part in hits.values() for hit in part]
    return sum(every) / len(every), {k: sum(v) / len(v) for k, v in sorted(hits.items())}


def rate(done: float, top: float) -> float:
    """Warm-up over 2%, flat, then down to zero over the last 40%."""
    if done < 0.02:
        return top * done / 0.02
    if done < 0.6:
        return top
    return top * max(0.0, 0.5 * (1 + math.cos(math.pi * (done - 0.6) / 0.4)))


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder aside in bfloat16, then put it in place."""
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    halved = {
        k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    model.save_pretrained(aside, state_dict=halved)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def main() -> None:
    """Train, exporting as it goes, and print the final accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("teacher", "student"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--lessons", choices=("problems", "basics"), default="problems")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="go on from this exported folder")
    parser.add_argument("--tokenizer", type=Path, default=HOME / "teacher", help="the student's")
    parser.add_argument("--out", type=Path, help="by default the package's own folder")
    args = parser.parse_args()
    args.out = args.out or HOME / args.model
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    teaches = args.model == "teacher"
    tokenizer = make_tokenizer() if teaches else AutoTokenizer.from_pretrained(args.tokenizer)
    width, inner, layers = (128, 336, 6) if teaches else (64, 112, 3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    if args.start:
        model.load_state_dict(load_file(args.start / "model.safetensors"), strict=False)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    began = last = time.time()
    steps = seen = tokens = 0
    seed = int(began) if args.start else 100
    texts = rows(seed) if args.lessons == "problems" else basics(seed)
    for ids, labels in batches(texts, tokenizer):
        done = (time.time() - began) / (60 * args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(done, args.rate)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        target = labels[:, 1:]
        logits = model.lm_head(hidden[target != -100])
        loss = torch.nn.functional.cross_entropy(logits, target[target != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, seen, tokens = steps + 1, seen + len(ids), tokens + int((ids != 0).sum())
        if steps % 50 == 0:
            speed = tokens / (time.time() - began)
            print(
                f"{done:5.1%} step {steps} loss {loss.item():.4f} {seen:,} rows {speed:,.0f} tok/s",
                flush=True,
            )
        if time.time() - last > 60 * min(6, args.minutes / 4):
            last = time.time()
            export(model, tokenizer, args.out)
            if args.lessons == "problems":
                share, by_steps = accuracy(model, tokenizer, "test", 100)
                print(f"  accuracy {share:.2f} {by_steps}", flush=True)
    export(model, tokenizer, args.out)
    shipped = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(f"{steps:,} steps, {seen:,} rows, {tokens:,} tokens, {time.time() - began:.0f} s")
    from limbeck.evals.score import wilson_interval

    for split in ("test", "phrasings", "chains"):
        share, by_steps = accuracy(shipped, tokenizer, split, 1000)
        low, high = wilson_interval(share, 1000)
        print(f"{split}: {share:.3f} [{low:.3f}, {high:.3f}] by steps {by_steps}", flush=True)


if __name__ == "__main__":
    main()
