# %% [markdown]
# # Block-sparse ResNet-50: prepare, prune, convert, report, time
#
# Each cell needs those above it. The network is untrained: this shows the mechanics and the speed, not accuracy.

# %%
import time
from statistics import median

import torch
import torchvision

import fxdbsr

MODEL, SIZE, BLOCK, SPARSITY, ROUNDS = "resnet50", 224, (32, 32), 0.5, 10

# %% a network and an image
torch.manual_seed(0)
model = torchvision.models.get_model(MODEL).eval()
x = torch.randn(1, 3, SIZE, SIZE)

# %% [markdown]
# ## Prepare
# Every conv but the first gets one scale a block. The outputs stay the same, bit for bit.

# %%
prepared = fxdbsr.prepare(model, config=fxdbsr.BlockConfig(BLOCK, by_name={"conv1": None}))
assert torch.equal(prepared(x), model(x))
scales = fxdbsr.block_scales(prepared)
print(f"{sum(scale.numel() for scale in scales.values()):,} blocks in {len(scales)} layers")

# %% [markdown]
# ## Prune half of the blocks of every layer, by the mean square of their weights
# In real use a `Sparsifier` does this during training, and the network adapts.

# %%
fxdbsr.block_prune_(prepared, SPARSITY)
print(fxdbsr.report(prepared, x).table(depth=1))

# %% [markdown]
# ## Convert
# Scales and batch norms are folded, zero blocks dropped, the rest packed; adds and activations go into the kernels.

# %%
fast = fxdbsr.convert(prepared).to(memory_format=torch.channels_last)
with torch.inference_mode():
    error = (fast(x) - prepared(x)).abs().max() / prepared(x).abs().max()
print(f"largest difference: {error:.1e} of the largest output")
assert error < 1e-4

# %% [markdown]
# ## Report
# MACs dense, kept, and run by the kernels; which engine runs each layer, and why.

# %%
report = fxdbsr.report(fast, x)
print(report.table(only_changed=True))
report.save_html("walkthrough.html")
report.save_graph("walkthrough.svg")

# %% [markdown]
# ## Time
# The two sides run in turns, so that a machine that slows down slows both. Eager PyTorch is the dense side here;
# `fxdbsr bench` also compares with torch.compile.

# %%
dense = model.to(memory_format=torch.channels_last)
image = x.contiguous(memory_format=torch.channels_last)
times: dict[str, list[float]] = {"dense": [], "sparse": []}
with torch.inference_mode():
    for turn in range(ROUNDS + 2):
        for name, net in (("dense", dense), ("sparse", fast)):
            start = time.perf_counter()
            net(image)
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
for name, found in times.items():
    print(f"{name:6}  {median(found):7.2f} ms, median of {ROUNDS}")
