"""Planning: what will be done, decided from headers and configs alone, without torch.

`resolve` opens what a recipe names; `make_plan` (`plan`) says what happens to every tensor and file, in the steps of
`planner`, or raises with all that is wrong. `inspection` tells of one adapter what it is and whether it fits a base.
"""
