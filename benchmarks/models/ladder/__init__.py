"""Training and sampling of DiT, one improvement after the other: `python -m benchmarks.models.ladder --out FOLDER`.

The first rungs are the plain PyTorch model as the reference ships it, then with what any user can switch on, then
diffusers' model; the last are ours. The fair baseline is "+ torch.compile". Every rung starts from the same weights and
its first results are compared with those of the plain model in float32 before it is timed; one that fails or differs is
a row with the reason and no figure. A rung whose row is in FOLDER, of the same commit and day, is not run again.

train, train-disk    label drop, noise, forward, hybrid loss, backward, AdamW and moving average; latents lie on the
                     device, or are read, a batch ahead, from a memory-mapped set as `dit-fast encode` writes it
sample, sample-cfg   DDPM, whole trajectories of few steps, divided by their number; guidance evaluates twice an image

MFU: model FLOPs (2 a multiply-add; training 3 x the forward pass, nothing for recomputation) over the dense bf16 peak
of the data sheet. Share of the roofline: the time that the roofline allows on this device, with the product
(bf16; float32 on a CPU) and the copy measured in the same run, over the median, for every precision alike.
"""
