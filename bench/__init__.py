"""Benchmarks: each measures Fleetmind beside a peer, or beside the thing it stands in front of, in one run.

Nothing here is a test and nothing gates on a time. A figure that was not measured is not written, and a run whose
answers were wrong is reported as failed, never as fast.
"""
