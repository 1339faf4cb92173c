"""Writes the JSON Schemas that are published, from the pydantic documents. Tests fail where one is out of date."""

import json
from pathlib import Path

from hookmap.cli import configuration
from hookmap.evaluation.experiments import document
from hookmap.maps import json_schema as architecture_map
from hookmap.maps.shipped import mappings_folder

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    for path, schema in {
        mappings_folder() / "architecture-map.schema.json": architecture_map.schema(),
        DOCS / "hookmap.schema.json": configuration.schema(),
        DOCS / "experiment.schema.json": document.schema(),
    }.items():
        path.write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}")
