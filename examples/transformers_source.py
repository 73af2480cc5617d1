"""A small GPT-2 on Python's own sources by Hugging Face's Trainer, on several ranks, with exact token counts.

Lines of different lengths are padded (labels of -100), ranks have different numbers of lines, and a step has
two micro-batches: a mean of means would be wrong three times over. The model is made on the spot; nothing is
downloaded. Compares with one process.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from _ways_in import all_batches, arguments, conclude, difference, padded, shares, source_lines
from torch import nn

import hvdloss.torch as hvd
from hvdloss.data import Shuffled
from hvdloss.torch.integrations.transformers import HorovodTrainer

ACCUMULATE, RATE, CLIP = 2, 0.5, 1.0


def make_model() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(hvd.rank())  # the ranks' models differ until rank 0's is everybody's
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def one_process(
    model: nn.Module, lines: list[torch.Tensor], sharding: Shuffled, epochs: int, batch: int
) -> None:
    """Train in a plain loop on all ranks' lines: the mean of all tokens of a step."""
    batches = list(all_batches(sharding, epochs, batch))
    of_an_epoch = len(batches) // epochs
    groups = [
        torch.cat(batches[e * of_an_epoch : (e + 1) * of_an_epoch][first : first + ACCUMULATE])
        for e in range(epochs)
        for first in range(0, of_an_epoch, ACCUMULATE)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(groups))
    for group in groups:
        data = padded([lines[i] for i in group])
        logits = model(data["input_ids"]).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()


def main() -> int:
    args = arguments(__doc__, epochs=2, batch=16)
    hvd.init()
    torch.set_num_threads(1)  # ranks share the cores
    transformers.utils.logging.disable_progress_bar()
    lines, model = source_lines(), make_model()
    sharding = Shuffled(len(lines), seed=1, shares=shares())
    settings = transformers.TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=ACCUMULATE,
        optim="sgd",
        learning_rate=RATE,
        max_grad_norm=CLIP,
        use_cpu=True,
        logging_steps=2,
        disable_tqdm=True,
        save_strategy="epoch",
        report_to="none",
    )
    trainer = HorovodTrainer(model, settings, train_dataset=lines, data_collator=padded, sharding=sharding)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    told = [entry["hvdloss/elements"] for entry in trainer.state.log_history if "hvdloss/elements" in entry]
    tokens = trainer.last_step.elements
    reference = make_model()
    hvd.broadcast_parameters(reference.state_dict(), root_rank=0)
    one_process(reference, lines, sharding, args.epochs, args.batch)
    error = difference(model, reference)
    return conclude(args, "Transformers", error, tokens_of_last_step=tokens, logged=len(told))


if __name__ == "__main__":
    sys.exit(main())
