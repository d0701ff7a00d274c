"""How a clinic note may be worded: five writers, each with sentences of their own.

A style maps a section to sentence templates. `{he} {his} {He} {His}` follow the patient; the other
fields are values of `hallulib.clinic.lexicon`. `HELD_OUT_STYLE` is written only into test data:
neither the base model nor any training split has ever seen its sentences.
"""

from __future__ import annotations

from hallulib.clinic.wordings import MISLEADING_WORDINGS, WORDINGS

HELD_OUT_STYLE = "handover"

STYLES: dict[str, dict[str, list[str]]] = {
    "letter": {
        "identity": [
            (
                "Thank you for seeing this {age}-year-old {sex}, who presents with {complaint} for "
                "{duration}."
            ),
            "I reviewed this {age}-year-old {sex} today because of {complaint} lasting {duration}.",
        ],
        "history": [
            "{His} past medical history includes {history}.",
            "{He} is known to have {history}.",
        ],
        "medications": [
            "{He} currently takes {medications}.",
            "Current treatment consists of {medications}.",
        ],
        "allergies": [
            "Drug allergies: {allergies}.",
            "With regard to allergies, {he} reports {allergies}.",
        ],
        "negatives": ["{He} denies {negatives}.", "There has been no {negatives_or}."],
        "vitals": [
            (
                "On examination the blood pressure was {blood_pressure} with a heart rate of "
                "{heart_rate}."
            ),
            "Blood pressure measured {blood_pressure}; the pulse was {heart_rate}.",
        ],
        "imaging": ["We obtained the following: {imaging}.", "Imaging to date: {imaging}."],
        "lab": ["Blood tests showed {lab}.", "The most notable result was {lab}."],
        "family_history": [
            "{His} {relative} had {illness}.",
            "The family history is notable for {illness} in {his} {relative}.",
        ],
        "smoking": ["Smoking history: {smoking}.", "As for tobacco, {smoking}."],
        "plan": ["We agreed to {plan}.", "I would suggest that we {plan}."],
        "follow_up": [
            "I will see {him} again {follow_up}.",
            "A further appointment is arranged {follow_up}.",
        ],
    },
    "soap": {
        "identity": [
            "CC: {complaint} for {duration}. Patient is a {age}-year-old {sex}.",
            "S: {age}-year-old {sex} with {complaint} for {duration}.",
        ],
        "history": ["PMH: {history}.", "Past history: {history}."],
        "medications": ["Meds: {medications}.", "Medications: {medications}."],
        "allergies": ["Allergies: {allergies}.", "Drug reactions: {allergies}."],
        "negatives": ["ROS: negative for {negatives_or}.", "ROS: no {negatives_or}."],
        "vitals": [
            "Vitals: BP {blood_pressure}, HR {heart_rate}.",
            "O: HR {heart_rate}, BP {blood_pressure}.",
        ],
        "imaging": ["Imaging: {imaging}.", "Studies: {imaging}."],
        "lab": ["Labs: {lab}.", "Laboratory: {lab}."],
        "family_history": ["FH: {illness} in {relative}.", "FH: {relative} with {illness}."],
        "smoking": ["SH: {smoking}.", "Tobacco: {smoking}."],
        "plan": ["P: {plan}.", "A/P: {plan}."],
        "follow_up": ["F/U {follow_up}.", "Return visit {follow_up}."],
    },
    "emergency": {
        "identity": [
            "Pt {age} y/o {sex}, {complaint} for {duration}.",
            "This {age}-year-old {sex} was brought in with {complaint}, onset {duration} ago.",
        ],
        "history": ["Hx {history}.", "Known {history}."],
        "medications": ["On {medications}.", "Home meds {medications}."],
        "allergies": ["All: {allergies}.", "Allergic hx: {allergies}."],
        "negatives": ["Denies {negatives}.", "No {negatives_or}."],
        "vitals": [
            "Triage BP {blood_pressure}, HR {heart_rate}.",
            "Obs: {blood_pressure}, pulse {heart_rate}.",
        ],
        "imaging": ["Got {imaging}.", "Radiology: {imaging}."],
        "lab": ["Bloods: {lab}.", "Stat {lab}."],
        "family_history": ["Fam hx {illness} ({relative}).", "{relative_cap} had {illness}."],
        "smoking": ["Smoker status: {smoking}.", "Tob: {smoking}."],
        "plan": ["Will {plan}.", "To do: {plan}."],
        "follow_up": ["Recheck {follow_up}.", "D/C with review {follow_up}."],
    },
    "dictation": {
        "identity": [
            (
                "This is a {age}-year-old {sex} who comes in complaining of {complaint} that "
                "started {duration} ago."
            ),
            "The patient, a {age}-year-old {sex}, has had {complaint} for the past {duration}.",
        ],
        "history": [
            "Medical problems are {history}.",
            "{He} has a background of {history}.",
        ],
        "medications": [
            "{He} tells me {he} is taking {medications}.",
            "The medication list shows {medications}.",
        ],
        "allergies": ["Allergies were reviewed: {allergies}.", "Listed allergies, {allergies}."],
        "negatives": [
            "{He} has not noticed any {negatives_or}.",
            "On questioning {he} denied {negatives}.",
        ],
        "vitals": [
            "Heart rate is {heart_rate} and blood pressure is {blood_pressure}.",
            "Vital signs today, blood pressure {blood_pressure}, pulse {heart_rate}.",
        ],
        "imaging": [
            "I looked at the films, {imaging}.",
            "Imaging showed the following, {imaging}.",
        ],
        "lab": ["The lab called with {lab}.", "Laboratory work shows {lab}."],
        "family_history": [
            "In the family, {his} {relative} suffered from {illness}.",
            "Family history of {illness}, {his} {relative}.",
        ],
        "smoking": ["Regarding cigarettes, {smoking}.", "Social history, {smoking}."],
        "plan": ["My plan is to {plan}.", "At this point I will {plan}."],
        "follow_up": ["Follow-up is {follow_up}.", "{He} will come back {follow_up}."],
    },
    "handover": {
        "identity": [
            (
                "Bed handover: {sex}, {age} years old, admitted for {complaint} present for "
                "{duration}."
            ),
            (
                "Taking over a {sex} of {age} years whose problem is {complaint}, going on for "
                "{duration}."
            ),
        ],
        "history": ["Background: {history}.", "Longstanding {history}."],
        "medications": ["Drug chart: {medications}.", "Prescribed {medications}."],
        "allergies": ["Allergy band: {allergies}.", "Allergies on the chart: {allergies}."],
        "negatives": ["Nil {negatives_or}.", "{He} says {he} has no {negatives_or}."],
        "vitals": [
            "Last round: BP {blood_pressure}, pulse {heart_rate}.",
            "Observations: heart rate {heart_rate}, blood pressure {blood_pressure}.",
        ],
        "imaging": ["Scan result: {imaging}.", "Report back on {imaging}."],
        "lab": ["Latest result {lab}.", "Path lab: {lab}."],
        "family_history": [
            "Relatives: {relative} with {illness}.",
            "Note {illness} in the {relative}.",
        ],
        "smoking": ["Cigarettes: {smoking}.", "Smoking chart: {smoking}."],
        "plan": ["Team wants to {plan}.", "Outstanding job: {plan}."],
        "follow_up": ["Next review {follow_up}.", "To be seen again {follow_up}."],
    },
}
SEEN_STYLES = [name for name in STYLES if name != HELD_OUT_STYLE]


def list_templates(style: str) -> dict[str, list[str]]:
    """Return section -> templates of a style.

    Two writers exist for pretraining only: "mixed" borrows from all seen styles, "any" also from
    :mod:`hallulib.clinic.wordings`.
    """
    if style not in ("mixed", "any"):
        return STYLES[style]
    more = WORDINGS if style == "any" else {}
    return {
        name: [t for seen in SEEN_STYLES for t in STYLES[seen][name]] + more.get(name, [])
        for name in STYLES[SEEN_STYLES[0]]
    }


# A value of the same kind that is not the patient's own, or no longer true: section -> templates
DISTRACTORS: dict[str, list[str]] = {
    "medications": [
        "{drug_cap} was stopped last year because of {reason}.",
        "{He} no longer takes {drug}.",
    ],
    "history": ["A work-up for {condition} was negative.", "{His} neighbour has {condition}."],
    "vitals": ["At the last visit the blood pressure was {blood_pressure}."],
    "complaint": ["An episode of {complaint} last winter resolved by itself."],
    "allergies": ["{His} daughter is allergic to {allergen}."],
    "smoking": ["{His} partner is a {smoker}."],
}


def list_distractors(style: str) -> dict[str, list[str]]:
    """Return section -> misleading sentences of a style; all styles but "any" share them."""
    more = MISLEADING_WORDINGS if style == "any" else {}
    return {name: sentences + more.get(name, []) for name, sentences in DISTRACTORS.items()}
