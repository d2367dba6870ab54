"""Render the chart by Helm's engine and check each object against the schemas of Kubernetes.

    python tests/deploy/render_chart.py CHART < VALUES

VALUES is a JSON object of values by the name of a variant. Prints what lint says, and by variant the objects, with the
problem that the schema of a Kubernetes version finds in each.
"""

import json
import sys

import helm_python
import kubernetes_validate
import yaml

VERSIONS = ("1.29", "1.37")
FOREIGN = ("keda.sh/",)  # groups of other projects, without a schema there


def problem(found):
    if found["apiVersion"].startswith(FOREIGN):
        return None
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return f"{version}: {error.message}"
    return None


def main(chart):
    variants, shown = json.load(sys.stdin), {}
    with helm_python.Chart.load(chart) as loaded:
        for name, values in variants.items():
            try:
                texts = loaded.render(values, name="demo", namespace="prod")
            except helm_python.HelmError as error:
                shown[name] = {"refused": str(error)}
                continue
            objects = [
                each
                for path, text in texts.items()
                if path.endswith(".yaml")
                for each in yaml.safe_load_all(text)
                if each
            ]
            notes = next(text for path, text in texts.items() if path.endswith("NOTES.txt"))
            shown[name] = {"objects": objects, "problems": [problem(each) for each in objects], "notes": notes}
    print(json.dumps({"lint": helm_python.lint(chart), "variants": shown}))


main(*sys.argv[1:])
