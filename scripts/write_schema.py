"""Writes mappings/architecture-map.schema.json from the pydantic document. A test fails where it is out of date."""

import json

from hookmap.architecture_map import schema
from hookmap.library import mappings_folder

if __name__ == "__main__":
    path = mappings_folder() / "architecture-map.schema.json"
    path.write_text(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
