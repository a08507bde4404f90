// Renders conversations with templates by Go's own text/template, under the rules of Ollama.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

type Job struct {
	Template string
	Chats    [][]Message
}

func render(t *template.Template, chat []Message) (string, error) {
	var systems []string
	var merged []*Message
	for _, message := range chat {
		if message.Role == "system" {
			systems = append(systems, message.Content)
		}
		if n := len(merged); n > 0 && merged[n-1].Role == message.Role {
			merged[n-1].Content += "\n\n" + message.Content
			continue
		}
		copied := message
		merged = append(merged, &copied)
	}
	var out strings.Builder
	err := t.Execute(&out, map[string]any{
		"System": strings.Join(systems, "\n\n"), "Messages": merged, "Response": "", "Tools": nil, "Think": false,
	})
	return out.String(), err
}

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	results := [][]string{}
	for _, job := range jobs {
		texts := []string{}
		t, err := template.New("").Option("missingkey=zero").Parse(job.Template)
		for _, chat := range job.Chats {
			text := ""
			if err == nil {
				text, err = render(t, chat)
			}
			if err != nil {
				text = "error: " + err.Error()
			}
			texts = append(texts, text)
		}
		results = append(results, texts)
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
