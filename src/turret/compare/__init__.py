"""Compares methods: the candidates, the statistics, the verdicts and the reports. Loads no torch."""
