"""What tests are made of, all of it offline.

- `small`: a base and adapters of nothing but safetensors and JSON, for tests that are not about values;
- `zoo`: tiny models of many families, adapters that peft saves for them, and what peft makes of both;
- `families`: the table of those models, and `rewrites`: the same adapters as older libraries wrote them;
- `layers`: one module of each class, and adapters of every method on them, as a method sees them;
- `headers`: bases and adapters by names and shapes alone, for digests that no library's version may change;
- `hub_server`: a Hub on loopback.
"""
