"""Token selection inside TRL's DistillationTrainer, as opd.py does it.

TRL brings what opd.py leaves out: several GPUs and machines (accelerate, FSDP,
DeepSpeed), rollouts by vLLM, LoRA. Put this file beside opd.py and use the class in
place of its parent, with `DistillationConfig(beta=1.0)`, which is reverse KL:

    pip install trl==1.16.0

    from trl import DistillationConfig
    from trl_trainer import SelectiveDistillationTrainer

The parent samples a batch of responses and computes the loss where `tool_mask` is 1. In
between, we score all positions, select, and write the selection into that mask.

The end of a response is one event here, too, as far as scores and selection go. TRL's
loss cannot merge ends: it would teach the student not to end where its teacher ends
with another token. So such a pair is refused; give both the same end ids.
"""

import torch
from trl import DistillationConfig, DistillationTrainer  # the first: to import it here

import opd


class SelectiveDistillationTrainer(DistillationTrainer):
    select = "teachability"  # as --select, --budget and --top-k of opd.py
    budget = 0.1
    support = 16  # K of D and C; TRL's own `top_k` is a filter of the sampling

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch  # in evaluation every position counts

        mask = batch["completion_mask"]  # [B, R]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        scores = self._scores(batch, mask > 0)

        # The budget is one of the whole batch, which lies on several processes.
        run = self.accelerator
        everyones = {}
        for name, values in scores.items():
            everyones[name] = run.gather(run.pad_across_processes(values, dim=1))
        everyones_mask = run.gather(run.pad_across_processes(mask, dim=1)) > 0
        generator = torch.Generator().manual_seed(self.state.global_step)
        ranks = opd.rank(self.select, everyones, everyones_mask, generator)
        keep = opd.select(ranks, everyones_mask, self.budget)

        first = run.process_index * len(mask)
        own = keep[first : first + len(mask), : mask.shape[1]]
        batch["tool_mask"] = own.long()
        batch["num_items_in_batch"] = keep.sum()  # the divisor, over all processes
        return batch

    def _scores(self, batch, mask):  # -> {name: [B, R]}
        student = self.accelerator.unwrap_model(self.model_wrapped)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        student_rows = student.config.get_text_config().vocab_size
        teacher_rows = teacher.config.get_text_config().vocab_size
        pair = opd.Pair(
            student,
            teacher,
            tokenizer=None,
            end_ids=self._end_ids(teacher),
            vocab_size=min(student_rows, teacher_rows),
            temperature=self.temperature,
        )
        # The weights of a sharded model are whole only inside of its own forward().
        # _forward_redirection(wrapper, model, function, ...) calls function(...) there.
        inside = self._forward_redirection
        return inside(
            self.model_wrapped,
            student,
            inside,
            self.teacher_model,
            teacher,
            self._measure,
            pair,
            batch,
            mask,
        )

    def _end_ids(self, teacher):
        teacher_ends = teacher.generation_config.eos_token_id
        if not isinstance(teacher_ends, list):
            teacher_ends = [teacher_ends]
        if set(teacher_ends) - {None} - set(self.eos_token_ids):
            raise ValueError(
                f"the student ends with {self.eos_token_ids}, its teacher with "
                f"{teacher_ends}: TRL's loss would unteach ending; give both the "
                "same generation_config.eos_token_id"
            )
        return sorted(self.eos_token_ids)

    @torch.no_grad()
    def _measure(self, pair, batch, mask):  # -> {name: [B, R]}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = mask.shape[1]
        hidden = []
        for model in (pair.student, pair.teacher):
            states = self._get_last_hidden_state(model, ids, attention, length)
            hidden.append(states[mask])  # [N, E]
        student_hidden, teacher_hidden = hidden
        all_tokens = batch["completion_ids"][mask]  # [N]

        parts = []
        for chunk in opd.chunks(pair, len(all_tokens)):
            part = opd.measure(
                opd.next_token_logits(pair, pair.student, student_hidden[chunk]),
                opd.next_token_logits(pair, pair.teacher, teacher_hidden[chunk]),
                self.support,
                all_tokens[chunk],
            )
            parts.append(part)

        scores = {}
        for name in parts[0]:
            grid = torch.zeros(mask.shape, device=mask.device)
            grid[mask] = torch.cat([part[name] for part in parts])
            scores[name] = grid
        return scores
