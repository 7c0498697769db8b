"""Short questions for the real pair, in runs/real/questions.jsonl. Each
is a chat in which two others of its kind are answered in one word. No question comes
twice: the last 200 lines, to be held out, ask nothing that the lines before ask."""

import json, random

SHOTS = 2  # of each kind, the first so many show how to answer and are never asked
tables = {
    "What is the plural of {}?": """
cat cats, box boxes, baby babies, child children, man men, woman women, foot feet, tooth
teeth, mouse mice, goose geese, leaf leaves, knife knives, wife wives, life lives, wolf
wolves, half halves, shelf shelves, loaf loaves, thief thieves, city cities, lady
ladies, party parties, story stories, country countries, family families, berry berries,
army armies, church churches, bus buses, dish dishes, watch watches, fox foxes, glass
glasses, bench benches, hero heroes, potato potatoes, tomato tomatoes, dog dogs, tree
trees, house houses, star stars, apple apples, river rivers, day days, key keys, toy
toys, monkey monkeys, book books, table tables, brush brushes, class classes, lion
lions, fly flies, cherry cherries, lake lakes, road roads, king kings, window windows,
peach peaches""",
    "What is the past tense of {}?": """
go went, walk walked, sing sang, eat ate, drink drank, run ran, see saw, take took, give
gave, come came, begin began, break broke, speak spoke, write wrote, ride rode, drive
drove, rise rose, fall fell, fly flew, grow grew, know knew, throw threw, blow blew,
draw drew, find found, hold held, tell told, sell sold, buy bought, bring brought, think
thought, teach taught, catch caught, fight fought, feel felt, keep kept, sleep slept,
leave left, meet met, send sent, spend spent, build built, lose lost, make made, say
said, pay paid, sit sat, stand stood, win won, swim swam, ring rang, hide hid, choose
chose, freeze froze, steal stole, wear wore, tear tore, forget forgot, shake shook,
become became, hear heard, lead led, feed fed, play played, ask asked, help helped, look
looked, jump jumped, live lived, like liked, stop stopped, carry carried, study studied,
try tried, cry cried, love loved, open opened, close closed""",
    "What is the comparative of {}?": """
big bigger, small smaller, happy happier, fast faster, slow slower, high higher, low
lower, old older, young younger, rich richer, poor poorer, sad sadder, dark darker,
early earlier, late later, wet wetter, full fuller, hard harder, soft softer, near
nearer, long longer, short shorter, strong stronger, weak weaker, thick thicker, thin
thinner, wide wider, clean cleaner, loud louder, sweet sweeter, heavy heavier, tall
taller, deep deeper, sharp sharper, warm warmer, cold colder, hot hotter, easy easier,
pretty prettier, funny funnier, nice nicer, safe safer, large larger, kind kinder, cheap
cheaper, bright brighter, quick quicker, good better, bad worse, smart smarter, busy
busier""",
    "On which continent is {}?": """
France Europe, Japan Asia, Egypt Africa, Italy Europe, Spain Europe, Germany Europe,
Greece Europe, Portugal Europe, Austria Europe, Poland Europe, Hungary Europe, Norway
Europe, Sweden Europe, Finland Europe, Denmark Europe, Ireland Europe, Belgium Europe,
Romania Europe, Bulgaria Europe, Croatia Europe, China Asia, India Asia, Thailand Asia,
Iran Asia, Iraq Asia, Syria Asia, Vietnam Asia, Nepal Asia, Pakistan Asia, Mongolia
Asia, Laos Asia, Cambodia Asia, Afghanistan Asia, Bangladesh Asia, Sri Lanka Asia,
Malaysia Asia, Kenya Africa, Ghana Africa, Nigeria Africa, Senegal Africa, Uganda
Africa, Sudan Africa, Somalia Africa, Angola Africa, Zambia Africa, Libya Africa,
Morocco Africa, Ethiopia Africa, Mali Africa, Niger Africa, Chad Africa, Algeria Africa,
Tunisia Africa""",
    "What do we call a person from {}?": """
France French, Japan Japanese, Egypt Egyptian, Italy Italian, Spain Spanish, Germany
German, Russia Russian, China Chinese, Greece Greek, Portugal Portuguese, Austria
Austrian, Poland Polish, Hungary Hungarian, Norway Norwegian, Sweden Swedish, Finland
Finnish, Denmark Danish, Ireland Irish, Cuba Cuban, Kenya Kenyan, Thailand Thai, Iran
Iranian, Iraq Iraqi, Syria Syrian, Peru Peruvian, Chile Chilean, Canada Canadian,
Australia Australian, Turkey Turkish, Vietnam Vietnamese, Belgium Belgian, Ukraine
Ukrainian, Romania Romanian, Bulgaria Bulgarian, Colombia Colombian, Jordan Jordanian,
Libya Libyan, Morocco Moroccan, Ghana Ghanaian, Nigeria Nigerian, Mexico Mexican, Brazil
Brazilian, India Indian, Israel Israeli, Ethiopia Ethiopian, Pakistan Pakistani, Lebanon
Lebanese""",
}
questions = {}
for ask, table in tables.items():
    pairs = " ".join(table.split()).split(", ")
    questions[ask] = [pair.rsplit(" ", 1) for pair in pairs]

dice = random.Random(0)
ones = "one two three four five six seven eight nine".split()
tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
names = {10 * i: ten for i, ten in enumerate(tens, 2)}
names |= {
    number + i: f"{ten}-{one}"
    for number, ten in list(names.items())
    for i, one in enumerate(ones, 1)
}
numbers = dice.sample(sorted(names), len(names))
questions["Write the number {} in digits."] = [(names[n], str(n)) for n in numbers]
numbers = dice.sample(range(20, 200), 160)
questions["Which number comes after {}?"] = [(str(n), str(n + 1)) for n in numbers]

records = []
for ask, pairs in questions.items():
    start = [{"role": "system", "content": "Answer in one word."}]
    for thing, answer in pairs[:SHOTS]:
        start.append({"role": "user", "content": ask.format(thing)})
        start.append({"role": "assistant", "content": answer})
    for thing, answer in pairs[SHOTS:]:
        question = {"role": "user", "content": ask.format(thing)}
        records.append({"messages": start + [question], "answer": answer})
asked = [record["messages"][-1]["content"] for record in records]
assert len(set(asked)) == len(asked)
dice.shuffle(records)
with open("runs/real/questions.jsonl", "w") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)
