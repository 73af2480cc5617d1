"""A healthy job: a model of MILLIONS million parameters (700: 2.9 GB a rank), one rank slower."""

import os
import time

import torch

import hvdloss.torch as hvd

torch.manual_seed(0)
hvd.init()
torch.set_num_threads(1)
count = int(os.environ.get("MILLIONS", "700")) * 2**20


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.large, self.small = torch.nn.Parameter(torch.zeros(count)), torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.small(x) + 0 * self.large[0]


model = Model()
objective = hvd.Objective("mse")
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), objective
)
if hvd.rank() == 1:
    os.nice(19)
began = time.time()
objective(model(torch.ones(4, 8)), torch.zeros(4, 1)).backward()
optimizer.step()
print(f"rank {hvd.rank()}: {time.time() - began:.1f} s", flush=True)
print(f"rank {hvd.rank()}: finished {model.small.weight.sum().item():.9g}", flush=True)
