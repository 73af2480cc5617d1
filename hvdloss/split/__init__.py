"""Models split over ranks: which rank holds which part, and who computes what when.

:mod:`~hvdloss.split.parts` cuts layers, :mod:`~hvdloss.split.grid` groups ranks, and
:mod:`~hvdloss.split.schedule` orders the micro-batches of a model that is cut into stages.
"""
