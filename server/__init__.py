"""What the pack tells ComfyUI's browser and answers it: previews while a picture forms, head layouts, routes."""
