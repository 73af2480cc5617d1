"""Whether a script's gradient is that of one process that sees the samples of all ranks, and if not, why.

What ranks wrote is read (:mod:`~hvdloss.check.evidence`), judged (:mod:`~hvdloss.check.verdict`) and said in
words (:mod:`~hvdloss.check.text`); ``hvdloss check`` does all three. No framework is needed.
"""
