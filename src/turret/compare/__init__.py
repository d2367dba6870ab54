"""Is one method as good as another: what is compared, the statistics, the verdict and the report. Loads no torch.

Refuses to know how a method is trained and where runs are kept: numbers come in, verdicts and pages go out.
"""
