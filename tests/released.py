"""The files of code that the Hub copies, written once more: no test asks the code under test which they are."""

CODE = (
    "architectures_mobilenet.py",
    "configuration_mobilenet.py",
    "cpu_mobilenet.py",
    "detection_mobilenet.py",
    "heads_mobilenet.py",
    "image_processing_mobilenet.py",
    "layers_mobilenet.py",
    "modeling_mobilenet.py",
    "postprocessing_mobilenet.py",
    "preprocessing_mobilenet.py",
    "segmentation_mobilenet.py",
)
CONVERTED = {*CODE, "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
