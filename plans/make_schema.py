"""Write `plans/schema.json`, the JSON Schema of the plan format, from the pydantic model."""

from __future__ import annotations

import json
from pathlib import Path

from layercache.plan import Plan

if __name__ == "__main__":
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Plan.model_json_schema()
    text = json.dumps(schema, indent=2, sort_keys=True) + "\n"
    Path(__file__).with_name("schema.json").write_text(text, encoding="utf-8")
