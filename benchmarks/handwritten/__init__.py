"""What `models.py` and `suite.py` compare with: the models as one writes them from the papers in plain torch.

None of the project's layers is used: `nn.Linear`s in lists, `nn.MultiheadAttention`, `nn.GRU`, loops over experts,
pairs and time. Where several ways are as natural, the fastest on CPU stands here. Each class reads the same `Embedded`
as the model of its name, knows the sizes in `common` alone, and copies that model's weights with `take`.
"""
