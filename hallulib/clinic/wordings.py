"""More ways to word a section, for pretraining only: no note of the course uses them.

They teach the base model to find a fact by what it is and not by the words before it, so that a
style it has never seen does not confuse it. None of them is a sentence of the held-out style.
`MISLEADING_WORDINGS` are sentences with a value that is not the patient's own, or no longer true.
"""

from __future__ import annotations

WORDINGS: dict[str, list[str]] = {
    "identity": [
        "Patient: {age}-year-old {sex}. Reason for visit: {complaint}, {duration}.",
        "Seen in clinic today: a {sex} aged {age}. Main problem {complaint}, since {duration}.",
        "Age {age}, {sex}. Presenting problem is {complaint} of {duration}.",
        "For the past {duration} this {sex} of {age} has suffered from {complaint}.",
        "A {sex}, {age}, referred by the practice with {complaint} over {duration}.",
        "Chief concern {complaint}. Duration {duration}. Patient {sex}, age {age}.",
    ],
    "history": [
        "Known conditions are {history}.",
        "Previous diagnoses: {history}.",
        "Comorbidities {history}.",
        "The problem list names {history}.",
        "Chronic illness: {history}.",
        "Earlier records mention {history}.",
        "Also has {history}.",
    ],
    "medications": [
        "Regular drugs: {medications}.",
        "Takes {medications} at home.",
        "The pharmacy list gives {medications}.",
        "Treated with {medications}.",
        "Rx {medications}.",
        "Maintained on {medications}.",
        "Tablets: {medications}.",
    ],
    "allergies": [
        "Allergy status: {allergies}.",
        "Reactions to drugs, {allergies}.",
        "Intolerances: {allergies}.",
        "Asked about allergies: {allergies}.",
        "Adverse reactions {allergies}.",
        "Allergy check: {allergies}.",
    ],
    "negatives": [
        "Does not report {negatives_or}.",
        "Negative for {negatives}.",
        "Without {negatives_or}.",
        "Absent: {negatives}.",
        "Never had {negatives_or}.",
        "Free of {negatives}.",
    ],
    "vitals": [
        "BP today {blood_pressure} and pulse {heart_rate}.",
        "HR {heart_rate} with a BP of {blood_pressure}.",
        "Pressure {blood_pressure}, rate {heart_rate}.",
        "Measured at the desk: {blood_pressure} mmHg, {heart_rate} per minute.",
        "Pulse {heart_rate} per minute, blood pressure {blood_pressure} mmHg.",
        "Nurse recorded heart rate {heart_rate}, BP {blood_pressure}.",
    ],
    "imaging": [
        "Radiology report: {imaging}.",
        "X-ray department sent {imaging}.",
        "Pictures show {imaging}.",
        "Findings on imaging, {imaging}.",
        "Available images: {imaging}.",
        "Reported today: {imaging}.",
    ],
    "lab": [
        "Chemistry: {lab}.",
        "Blood work with {lab}.",
        "Abnormal value, {lab}.",
        "Result of note: {lab}.",
        "Lab sheet shows {lab}.",
        "Sample taken, {lab}.",
    ],
    "family_history": [
        "Family: {illness} in {relative}.",
        "{His} {relative} suffered {illness}.",
        "Runs in the family, {illness} ({his} {relative}).",
        "A {relative} with {illness}.",
        "Kin: {relative}, {illness}.",
        "{illness} is known in {his} {relative}.",
    ],
    "smoking": [
        "Tobacco use: {smoking}.",
        "Smokes? {smoking}.",
        "Nicotine, {smoking}.",
        "Lifestyle: {smoking}.",
        "Asked about smoking, {smoking}.",
        "Habits {smoking}.",
    ],
    "plan": [
        "Next step: {plan}.",
        "Decision: {plan}.",
        "Advice given, {plan}.",
        "We will {plan}.",
        "Agreed to {plan}.",
        "Action {plan}.",
    ],
    "follow_up": [
        "Come back {follow_up}.",
        "Appointment {follow_up}.",
        "Control {follow_up}.",
        "Will be seen {follow_up}.",
        "Revisit {follow_up}.",
        "Booked for review {follow_up}.",
    ],
}

MISLEADING_WORDINGS: dict[str, list[str]] = {
    "medications": [
        "Came off {drug} some time ago.",
        "{drug_cap} was not tolerated because of {reason}.",
        "Used to be on {drug}.",
    ],
    "history": [
        "No sign of {condition}.",
        "{His} colleague suffers from {condition}.",
        "{condition} was ruled out.",
    ],
    "vitals": [
        "Last month it was {blood_pressure}.",
        "Earlier reading {blood_pressure}, at home.",
        "The previous note has BP {blood_pressure}.",
    ],
    "complaint": [
        "Once had {complaint}, long ago.",
        "Last year {he} was seen for {complaint}.",
        "No return of {complaint}.",
    ],
    "allergies": [
        "A cousin reacts to {allergen}.",
        "{allergen} gave {his} brother a rash.",
        "{His} aunt cannot take {allergen}.",
    ],
    "smoking": [
        "Lives with a {smoker}.",
        "{His} brother is a {smoker}.",
        "At home there is another {smoker}.",
    ],
}
